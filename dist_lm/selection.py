"""Which evaluation was the best, and when it no longer gets better.

Enters: held-out figures.  Leaves: decisions.  Promises: equal figures give equal decisions on every
rank; the state is a few JSON values in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dist_lm.config import BestSection, EarlyStopSection
from dist_lm.errors import ConfigError

_LESS_IS_BETTER = ("loss", "perplexity", "error")


class Selection:
    """The best value of one held-out figure so far."""

    def __init__(self, section: BestSection, *, key: str) -> None:
        self._section, self._key, self.metric = section, key, section.metric
        less = any(word in section.metric for word in _LESS_IS_BETTER)
        self._sign = -1.0 if (section.mode == "min" or (section.mode == "auto" and less)) else 1.0
        self._delta = section.min_delta if isinstance(section, EarlyStopSection) else 0.0
        self.best: float | None = None
        self.without_improvement = 0
        """Evaluations since the best one."""

    def see(self, figures: Mapping[str, float]) -> bool:
        """One evaluation; True: it is the best so far.  Raises ConfigError for an unknown figure."""
        if self._section.metric not in figures:
            raise ConfigError(
                f"the evaluation has no figure `{self._section.metric}`",
                where=f"{self._key}.metric",
                why=f"It has: {', '.join(figures)}.",
                do="Name one of these, and run the same command again.",
            )
        value = figures[self._section.metric]
        # A figure that is not a number is never better.
        better = self.best is None or self._sign * (value - self.best) > self._delta
        if better:
            self.best, self.without_improvement = value, 0
        else:
            self.without_improvement += 1
        return better

    @property
    def exhausted(self) -> bool:
        """True once patience is used up."""
        return isinstance(self._section, EarlyStopSection) and self.without_improvement >= self._section.patience

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "without_improvement": self.without_improvement}

    def restore(self, state: dict[str, Any]) -> None:
        """State of `state`; an empty one is that before the first evaluation."""
        self.best = state.get("best")
        self.without_improvement = int(state.get("without_improvement", 0))
