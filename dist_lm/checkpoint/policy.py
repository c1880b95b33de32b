"""When to save: every so many steps, or every so often.

Enters: run.save_every and, for a length of time, a clock.  Leaves: a decision, which rank 0 takes for
all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from dist_lm.duration import seconds


class SavePolicy:
    """Periodic saves of one attempt."""

    def __init__(self, every: int | str, clock: Callable[[], float] = time.monotonic) -> None:
        self._steps = every if isinstance(every, int) else 0
        self._every_s = 0.0 if isinstance(every, int) else seconds(every)
        self._clock = clock
        self._saved_at = clock()

    def is_due(self, step: int) -> bool:
        """Whether to save after this step."""
        if self._steps:
            return step % self._steps == 0
        return self._clock() - self._saved_at >= self._every_s

    def saved(self) -> None:
        """A save begins now, for whatever reason."""
        self._saved_at = self._clock()
