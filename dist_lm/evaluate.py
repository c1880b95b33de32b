"""Metrics over a held-out set during training.

Enters: an engine, a task, a prepared data set.  Leaves: averages over every row, each seen once.
Promises: the figures do not depend on the number of ranks but for rounding; logits are never
gathered, only sums.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_lm.data.heldout import HeldoutRows
from dist_lm.engine import Engine
from dist_lm.metrics import averages
from dist_lm.ranks import Ranks
from dist_lm.tasks.base import Task

_LOOK_EVERY = 8
"""Micro-batches between two looks for a stop request."""


def _never() -> bool:
    return False


def evaluate(
    engine: Engine,
    task: Task,
    location: str,
    ranks: Ranks,
    *,
    micro_rows: int,
    seed: int,
    stop_now: Callable[[], bool] = _never,
) -> dict[str, float]:
    """Averages over the data set in `location`; a collective call of all ranks.

    `stop_now`: asked now and then, at the same micro-batch on every rank; once it says yes, the
    result is empty.
    """
    names = [f"{name}_{part}" for name in task.objectives for part in ("loss", "correct")]
    sums = dict.fromkeys(names, 0.0)
    targets = dict.fromkeys(task.objectives, 0.0)
    rows = HeldoutRows(
        location,
        rank=ranks.rank,
        world_size=ranks.world_size,
        micro_rows=micro_rows,
        seq_len=task.view.seq_len,
        partner_columns=task.partner_columns,
        seed=seed,
    )
    for number, micro_rows_of_rank in enumerate(rows):
        if number % _LOOK_EVERY == 0 and stop_now():
            return {}
        micro_batch = task.collate(micro_rows_of_rank)
        for name, value in engine.evaluate(micro_batch).items():
            sums[name] += float(value)
        for name, count in micro_batch.targets.items():
            targets[name] += count
    totals = ranks.sum([*sums.values(), *targets.values()])
    return averages(
        dict(zip(names, totals[: len(names)], strict=True)),
        dict(zip(task.objectives, totals[len(names) :], strict=True)),
    )
