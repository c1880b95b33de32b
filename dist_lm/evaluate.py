"""Metrics over a held-out set during training.

Enters: an engine, a task, a prepared data set.  Leaves: averages over every row, each seen once.
Promises: the figures do not depend on the number of ranks but for rounding; logits are never
gathered, only sums.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_lm.data.cache import ShardCache
from dist_lm.data.handover import Handover
from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.rows import Rows
from dist_lm.engine import Engine
from dist_lm.mesh import Mesh
from dist_lm.metrics import averages
from dist_lm.ranks import Ranks
from dist_lm.scores.base import Table
from dist_lm.sequence_parallel import part_of
from dist_lm.tasks.base import PREDICTED, Task


@dataclass(frozen=True)
class Evaluation:
    """Of one held-out set, or of several."""

    figures: dict[str, float]
    tables: dict[str, dict[str, Table]] = field(default_factory=dict)
    """By held-out set, the only one is "": `classes` and `confusion`, where the task has them (scores/base.py)."""


def _never() -> bool:
    return False


def evaluate_all(
    engine: Engine, task: Task, sets: Mapping[str, str], ranks: Ranks, **options: Any
) -> Evaluation | None:
    """Of each held-out set by its name, which its figures begin with; None where a rank gave up.

    `options`: those of `evaluate`.
    """
    figures, tables = dict[str, float](), dict[str, dict[str, Table]]()
    for name, location in sets.items():
        found = evaluate(engine, task, location, ranks, **options)
        if found is None:
            return None
        prefix = f"{name}_" if name else ""
        figures |= {prefix + figure: value for figure, value in found.figures.items()}
        if found.tables:
            tables[name] = found.tables[""]
    return Evaluation(figures, tables)


def evaluate(
    engine: Engine,
    task: Task,
    location: str,
    ranks: Ranks,
    *,
    mesh: Mesh,
    micro_rows: int,
    seed: int,
    cache: ShardCache | None = None,
    give_up: Callable[[], bool] = _never,
) -> Evaluation | None:
    """Averages over the data set in `location`; a collective call of all ranks.

    `give_up`: once it says yes on any rank, the result is None, also where data are waited for.
    """
    sums: dict[str, float] = {}
    targets = dict.fromkeys(task.objectives, 0.0)
    state = task.metrics_state()
    rows = HeldoutRows(
        location,
        rank=mesh.data_rank,
        world_size=mesh.data_world_size,
        micro_rows=micro_rows,
        seq_len=task.view.seq_len,
        partner_columns=task.partner_columns,
        seed=seed,
        cache=cache,
    )
    with contextlib.closing(Handover[Rows]()) as handover:
        handover.start(iter(rows), "dist_lm-heldout-reader")
        for _ in range(len(rows)):
            own = handover.get(give_up)
            # Every time: at ZeRO-3 a forward pass is a collective call, too.
            if ranks.sum([give_up()])[0] or own is None:
                return None
            micro_batch = part_of(task.collate(own), mesh)
            outputs = engine.evaluate(micro_batch)
            predicted = outputs.pop(PREDICTED, None)
            if state is not None and predicted is not None:
                task.judge(state, predicted.cpu(), micro_batch)
            for name, value in outputs.items():
                sums[name] = sums.get(name, 0.0) + float(value)
            for name, count in micro_batch.targets.items():
                targets[name] += count
    # Every rank sees at least one micro-batch, so all know the same names.
    names = sorted(sums)
    totals = ranks.sum([*(sums[name] for name in names), *targets.values()])
    figures = averages(
        dict(zip(names, totals[: len(names)], strict=True)),
        dict(zip(task.objectives, totals[len(names) :], strict=True)),
    )
    if state is None:
        return Evaluation(figures)
    counts = ranks.gather(state.counts())
    tables = state.tables(counts)
    return Evaluation(figures | state.compute(counts), {"": tables} if tables else {})
