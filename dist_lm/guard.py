"""When a run has diverged: a pure function of what all ranks have seen alike.

Enters: for each step, whether its update was applied, and the global loss.  Leaves: a decision.
Promises: the same on every rank; its state is a few JSON values, so that a resumed run decides as
the uninterrupted one does.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

WINDOW = 128
"""Losses of good steps that the running estimate is made of."""
LEAST = 16
"""Losses before the first spike can be told."""


class DivergenceGuard:
    """Counts bad steps: skipped ones, losses that are not finite, spikes."""

    def __init__(self, *, bad_steps: int, spike_mads: float) -> None:
        self._limit, self._mads = bad_steps, spike_mads
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.bad_in_row = 0

    def see(self, *, applied: bool, loss: float | None = None) -> bool:
        """One step; True: it is time to go back to a checkpoint.  `loss`: None where it is unknown."""
        if applied and not self._is_bad(loss):
            self.bad_in_row = 0
            if loss is not None:
                self._losses.append(loss)
        else:
            self.bad_in_row += 1
        return self.bad_in_row >= self._limit

    def _is_bad(self, loss: float | None) -> bool:
        if loss is None:
            return False
        if not math.isfinite(loss):
            return True
        if not self._mads or len(self._losses) < LEAST:
            return False
        middle = median(self._losses)
        deviation = median(abs(value - middle) for value in self._losses)
        return loss > middle + self._mads * max(deviation, 1e-3 * abs(middle))

    def state(self) -> dict[str, Any]:
        return {"losses": list(self._losses), "bad_in_row": self.bad_in_row}

    def restore(self, state: dict[str, Any]) -> None:
        """State of `state`; an empty one is that of a new guard."""
        self._losses = deque(state.get("losses", []), maxlen=WINDOW)
        self.bad_in_row = int(state.get("bad_in_row", 0))
