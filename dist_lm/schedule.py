"""Learning rate and batch division as pure functions of the step and the number of ranks.

Enters: settings and a step.  Leaves: numbers.  Promises: no state, so a resume needs none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_lm.config import OptimSection
from dist_lm.errors import ConfigError


def learning_rate(optim: OptimSection, *, step: int, steps: int) -> float:
    """Learning rate of update number `step` (the first is 1) in a run of `steps` updates.

    The final share is reached one step after the end, so that the last update still moves weights.
    """
    schedule = optim.schedule
    if step <= schedule.warmup_steps:
        return optim.lr * step / schedule.warmup_steps
    final = schedule.final_share
    if schedule.kind == "constant":
        return optim.lr
    if schedule.kind == "wsd":
        begin = steps - schedule.decay_steps
        if step <= begin:
            return optim.lr
        return optim.lr * (1.0 - (1.0 - final) * (step - begin) / (schedule.decay_steps + 1))
    progress = (step - schedule.warmup_steps - 1) / max(1, steps - schedule.warmup_steps)
    fall = progress if schedule.kind == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return optim.lr * (1.0 - (1.0 - final) * fall)


@dataclass(frozen=True)
class BatchPlan:
    """How one global batch is divided: the same number of micro-batches on every rank."""

    global_rows: int
    world_size: int
    rows_per_rank: int
    """Rows of the fullest rank; ranks with fewer get rows of weight zero."""
    micro_steps: int
    rows_per_micro: int

    @classmethod
    def divide(cls, global_rows: int, micro_rows: int, world_size: int) -> BatchPlan:
        """Fewest micro-batches of at most `micro_rows` rows, as even as they can be."""
        if global_rows < world_size:
            raise ConfigError(
                f"a global batch of {global_rows} rows cannot feed {world_size} ranks",
                where="batch.global",
                why="Every rank needs at least one row a step.",
                do=f"Set batch.global to {world_size} or more, or start fewer ranks.",
            )
        rows_per_rank = math.ceil(global_rows / world_size)
        micro_steps = math.ceil(rows_per_rank / micro_rows)
        return cls(global_rows, world_size, rows_per_rank, micro_steps, math.ceil(rows_per_rank / micro_steps))
