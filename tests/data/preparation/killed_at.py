"""A preparation that dies by SIGKILL when it is about to publish its n-th file, or has just done so."""

from __future__ import annotations

import os
import signal
from typing import Any

from dist_lm.data.prepare import PrepareOptions, prepare

_replace = os.replace


def prepare_until(last: int, moment: str, options: PrepareOptions) -> None:
    """`moment`: before or after."""
    published = 0

    def replace(source: Any, target: Any) -> None:
        nonlocal published
        published += 1
        if published == last and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        _replace(source, target)
        if published == last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    prepare(options)
