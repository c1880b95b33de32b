"""What the installed Ray understands: options of `ray start`, keys of a runtime_env.

Enters: nothing.  Leaves: names.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from functools import cache

from dist_lm.cluster.typed_yaml import suggestion

RUNTIME_ENV_KEYS = (
    "env_vars",
    "working_dir",
    "py_modules",
    "py_executable",
    "excludes",
    "pip",
    "uv",
    "conda",
    "image_uri",
    "nsight",
    "rocprof_sys",
    "worker_process_setup_hook",
    "config",
)
VARIABLES = ("RAY_JOB_STOP_WAIT_TIME_S", "RAY_DEDUP_LOGS", "RAY_AUTH_MODE", "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S")
"""Variables that the shipped files set: Ray reads those it knows and is silent about the others."""


@cache
def start_options() -> tuple[str, ...]:
    """Names of the options of `ray start`, without dashes."""
    from ray.scripts.scripts import start

    return tuple(option[2:] for parameter in start.params for option in parameter.opts if option.startswith("--"))


def wrong_options(command: str) -> Iterator[str]:
    """What is wrong with the `ray start` inside a shell command."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        yield f"the shell cannot read this: {error}"
        return
    inside = False
    for previous, word in zip(["", *words], words, strict=False):
        if word == "start" and previous == "ray":
            inside = True
        elif word in ("&&", "||", ";", "|", "&") or word.endswith(";"):
            inside = False
        name = word.split("=")[0].removeprefix("--")
        if inside and word.startswith("--") and name not in start_options():
            yield f"`ray start` has no option `--{name}`. {suggestion(name, start_options())}".strip()
