"""DeepSpeed's compiled ops: built before any rank starts, and never waited for in vain.

Enters: nothing but the machine.  Leaves: the op that DeepSpeed loads on the CPU, in torch's
extensions folder of this Python environment.  Promises: one build at a time; a lock that a killed
build left behind is removed, where no live process holds it (torch waits for such a lock for ever).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dist_lm.errors import EnvironmentFault

log = logging.getLogger(__name__)
CPU_OP = "deepspeed_shm_comm"
CPU_ADAM = "cpu_adam"
ASYNC_IO = "async_io"
_PROGRAMS = {
    CPU_OP: "from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as Builder",
    CPU_ADAM: "from deepspeed.ops.op_builder import CPUAdamBuilder as Builder",
    ASYNC_IO: "from deepspeed.ops.op_builder import AsyncIOBuilder as Builder",
}
EXTENSIONS_VARIABLE = "TORCH_EXTENSIONS_DIR"
"""torch reads it; every process of a run has it set to `extensions_folder`."""


COMPILED_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def compiled_folder() -> Path:
    """Where torch.compile keeps what it has compiled, for the next start."""
    configured = os.environ.get(COMPILED_VARIABLE)
    return Path(configured) if configured else extensions_folder().parent.parent / "torch_compiled"


def extensions_folder() -> Path:
    """Where torch keeps compiled extensions of this Python environment."""
    configured = os.environ.get(EXTENSIONS_VARIABLE)
    if configured:
        return Path(configured)
    # torch's own choice is one folder for all environments of a user: two of them then rebuild each
    # other's op at every start, under the feet of running ranks.
    place = hashlib.sha256(sys.prefix.encode()).hexdigest()[:12]
    version = f"py{sys.version_info.major}{sys.version_info.minor}"
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "torch_extensions" / f"dist_lm-{version}-{place}"


def own_tools_path() -> str:
    """PATH with this Python environment's programs first.

    torch builds with whatever `ninja` it finds, and two versions do not read each other's logs: where
    PATH changes between starts, the op would be built anew each time.
    """
    own = str(Path(sys.executable).parent)
    others = [entry for entry in os.environ.get("PATH", os.defpath).split(os.pathsep) if entry != own]
    return os.pathsep.join([own, *others])


def is_built(name: str = CPU_OP) -> bool:
    folder = extensions_folder() / name
    return (folder / f"{name}.so").is_file() and not (folder / "lock").exists()


def stale_locks() -> list[Path]:
    """Locks of builds that died."""
    # torch's builder keeps its lock file open while it builds.
    locks = sorted(extensions_folder().glob("*/lock"))
    return [lock for lock in locks if not any(_holds(process, lock) for process in _own_processes())]


def remove_stale_locks() -> list[Path]:
    """Remove locks of builds that died; returns them."""
    removed = stale_locks()
    for lock in removed:
        lock.unlink(missing_ok=True)
        log.warning("removed the lock of a build that died: %s", lock)
    return removed


def build_cpu_op() -> None:
    """Build the op of CPU ranks unless it is there.  Raises EnvironmentFault with the compiler's words."""
    build(CPU_OP)


def build(name: str) -> None:
    """Build an op unless it is there.  Raises EnvironmentFault with the compiler's words."""
    folder = extensions_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".dist_lm.lock").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        died = remove_stale_locks()
        # What a build that died has left may look finished, and each rank would build it again.
        if is_built(name) and not died:
            return
        log.info("building DeepSpeed's op %s once (about a minute) ...", name)
        load(name)


def load(name: str) -> None:
    """Load an op in a process of its own, which builds it where it is missing or out of date.

    Raises EnvironmentFault with the compiler's words.
    """
    # The deepspeed of a rank: on a machine without a GPU it builds for the CPU.
    cpu = {"DS_ACCELERATOR": "cpu"} if name == CPU_OP else {}
    environment = {"PATH": own_tools_path(), EXTENSIONS_VARIABLE: str(extensions_folder()), **cpu}
    code = f"{_PROGRAMS[name]}; Builder().load(verbose=False)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = [line for line in (done.stdout + done.stderr).splitlines() if "rror" in line]
        raise EnvironmentFault(
            f"DeepSpeed's op {name} cannot be built",
            why="\n".join(words[:3]) or f"the build ended with code {done.returncode}",
            do="Install a C++ compiler (Debian: apt-get install g++), then run `dist-lm ops build`.",
        )


def _own_processes() -> Iterator[int]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            yield int(entry.name)


def _holds(process: int, path: Path) -> bool:
    wanted = str(path.resolve())
    try:
        links = list(Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        # The process is gone, or another user's.
        return False
    for link in links:
        # One file closed meanwhile says nothing about the others.
        with contextlib.suppress(OSError):
            if os.readlink(link) == wanted:
                return True
    return False
