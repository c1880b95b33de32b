"""The compiled ops of DeepSpeed that a run needs: a compiler, no lock in the way, built, loadable.

Enters: the DeepSpeed settings of a run, if there is one.  Leaves: findings.
Promises: nothing is built or removed but by a finding's `fix`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dist_lm import ops
from dist_lm.deepspeed_keys import needed_ops
from dist_lm.doctor.finding import Finding, fail, of_error, ok, warn
from dist_lm.errors import EnvironmentFault


def check_ops(settings: Mapping[str, Any], *, cpu: bool) -> Iterator[Finding]:
    stale = ops.stale_locks()
    for lock in stale:
        do = "`dist-lm doctor --fix`, or remove the file: torch would wait for it for ever."
        yield fail("op locks", f"a build that died left {lock}", do, ops.remove_stale_locks)
    needed = needed_ops(settings, cpu=cpu)
    unbuilt = [name for name in needed if not ops.is_built(name)]
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler, path=ops.own_tools_path()) is None:
        do = "Install a C++ compiler (Debian: apt-get install g++), or set CXX."
        waiting = f"; {', '.join(unbuilt)} cannot be built" if unbuilt else ""
        yield (fail if unbuilt else warn)("compiler", f"there is no {compiler} in PATH{waiting}", do)
        return
    if ops.CPU_OP not in needed and ops.ASYNC_IO in unbuilt and not os.environ.get("CUDA_HOME"):
        yield warn("compiler", "CUDA_HOME is not set", "export CUDA_HOME=/usr/local/cuda if building an op fails.")
    for name in needed:
        if name in unbuilt:
            do = "`dist-lm doctor --fix` builds it now; else the first start does (about a minute)."
            yield warn("ops", f"{name} is not built yet", do, _builder(name))
        elif not stale:
            # Loading would wait for a lock.
            yield _loads(name)


def _builder(name: str) -> Callable[[], None]:
    return lambda: ops.build(name)


def _loads(name: str) -> Finding:
    try:
        ops.load(name)
    except EnvironmentFault as error:
        return of_error("ops", error)
    return ok("ops", f"{name} is built and loads")
