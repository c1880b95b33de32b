"""Lengths of time as people write them.

Enters: text such as 90s, 15min, 11h30min.  Leaves: seconds.  Promises: what matches DURATION has one
meaning.
"""

from __future__ import annotations

import re

DURATION = r"^([0-9]+(d|h|min|s))+$"
_UNIT_S = {"d": 86400, "h": 3600, "min": 60, "s": 1}


def seconds(text: str) -> float:
    """Seconds of a text that matches DURATION.  Raises ValueError for any other."""
    if not re.match(DURATION, text):
        raise ValueError(f"`{text}` is no length of time; write 90s, 15min or 11h30min")
    return float(sum(int(count) * _UNIT_S[unit] for count, unit in re.findall(r"([0-9]+)(d|h|min|s)", text)))


def spoken(duration_s: float) -> str:
    """`3 s`, `4.2 min`, `1.5 h`."""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if duration_s >= length:
            return f"{duration_s / length:.1f} {unit}"
    return f"{duration_s:.0f} s"
