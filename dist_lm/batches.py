"""One step's work on one rank.

Enters: this rank's rows of a global batch.  Leaves: micro-batches of equal size, as many on every
rank, and what all ranks have agreed about the step.
"""

from __future__ import annotations

from dataclasses import dataclass

from dist_lm.data.rows import Rows, StepRows
from dist_lm.schedule import BatchPlan
from dist_lm.tasks.base import MicroBatch


@dataclass(frozen=True)
class Batch:
    """What goes into one optimizer update."""

    rows: StepRows
    micro_batches: list[MicroBatch]
    targets: dict[str, float]
    """Objective -> targets over all ranks."""
    global_tokens: int
    """Tokens that are not padding, over all ranks."""
    local_tokens: int
    """Those of this rank."""
    seconds: float
    """Time that this rank waited for its rows and for the other ranks."""


def divide(rows: Rows, plan: BatchPlan) -> list[Rows]:
    """This rank's rows as the plan's micro-batches; the last is filled with rows of weight zero."""
    size = plan.rows_per_micro
    return [rows.take(slice(begin, begin + size)).padded(size) for begin in range(0, size * plan.micro_steps, size)]
