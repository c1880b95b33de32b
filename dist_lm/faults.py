"""Named places in the code where a test can make something go wrong.

Enters: DIST_LM_FAULT, such as `kill@rank1:step10:before_publish` (`*`: every rank, every step).
Leaves: the fault, at that place: SIGKILL or SIGSTOP of this process, an out-of-memory error, a full
disk, a loss that is not finite, a wall clock that jumps back a day, a wait until the file that
DIST_LM_FAULT_GATE names is there (`held` is put beside it first).  It happens once, in the first
attempt; with `:always` at the end, each time and in every attempt.
Promises: without the variable, nothing happens.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path

from dist_lm.errors import ConfigError

VARIABLE = "DIST_LM_FAULT"
GATE_VARIABLE = "DIST_LM_FAULT_GATE"
_DAY_S = 86400.0
_LOOK_S = 0.02
POINTS = (
    "before_data",
    "before_forward",
    "in_forward",
    "in_loss",
    "in_collective",
    "before_optimizer",
    "after_step",
    "before_save",
    "after_snapshot",
    "before_write",
    "in_write",
    "after_write",
    "after_report",
    "before_manifest",
    "before_publish",
    "after_publish",
    "before_prune",
    "after_prune",
    "in_evaluation",
    "in_export",
    "before_rename",
)
OF_EXPORT = ("in_export", "before_rename")
"""The points that are not in training."""
ACTIONS = ("kill", "stop", "oom", "full", "nan", "clock", "hold")
_fired: set[str] = set()
_PATTERN = re.compile(r"(?P<action>\w+)@rank(?P<rank>\d+|\*):step(?P<step>\d+|\*):(?P<point>\w+)(?P<always>:always)?")


def fault_point(point: str, *, rank: int, step: int, attempt: int = 1) -> str:
    """Let the fault happen here if the variable arms this place.

    Returns the action where the caller must see to it itself: `nan`; else an empty text.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return ""
    match = _PATTERN.fullmatch(text)
    if match is None or match["point"] not in POINTS or match["action"] not in ACTIONS:
        raise ConfigError(
            f"{VARIABLE}={text} names no place in the code",
            why=f"Actions: {', '.join(ACTIONS)}.",
            do=f"Write ACTION@rankR:stepN:POINT with POINT one of {', '.join(POINTS)}.",
        )
    if point != match["point"] or match["step"] not in ("*", str(step)) or match["rank"] not in ("*", str(rank)):
        return ""
    if not match["always"]:
        if attempt > 1 or text in _fired:
            return ""
        _fired.add(text)
    return _act(match["action"])


def forget() -> None:
    """Let what has happened happen again: for several runs in one process."""
    _fired.clear()


def _act(action: str) -> str:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "oom":
        raise MemoryError("out of memory: a test asked for this")
    elif action == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif action == "clock":
        honest = time.time
        time.time = lambda: honest() - _DAY_S
    elif action == "hold":
        gate = Path(os.environ[GATE_VARIABLE])
        gate.with_name("held").touch()
        while not gate.exists():
            time.sleep(_LOOK_S)
    return action
