"""Named places in the code where a test can make a process die.

Enters: DIST_LM_FAULT, such as `kill@rank1:step10:before_publish` (rank `*`: every rank).
Leaves: SIGKILL of this process at that place.  Promises: without the variable, nothing happens.
"""

from __future__ import annotations

import os
import re
import signal

from dist_lm.errors import ConfigError

VARIABLE = "DIST_LM_FAULT"
POINTS = (
    "before_forward",
    "before_optimizer",
    "after_step",
    "before_save",
    "after_write",
    "before_publish",
    "after_publish",
    "in_evaluation",
)
_PATTERN = re.compile(r"kill@rank(?P<rank>\d+|\*):step(?P<step>\d+):(?P<point>\w+)")


def fault_point(point: str, *, rank: int, step: int, attempt: int = 1) -> None:
    """Die here if the variable arms this place.  Only a run's first attempt dies."""
    armed = os.environ.get(VARIABLE)
    if not armed:
        return
    match = _PATTERN.fullmatch(armed)
    if match is None or match["point"] not in POINTS:
        raise ConfigError(
            f"{VARIABLE}={armed} names no place in the code",
            do=f"Write kill@rankR:stepN:POINT with POINT one of {', '.join(POINTS)}.",
        )
    here = point == match["point"] and step == int(match["step"]) and match["rank"] in ("*", str(rank))
    if here and attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)
