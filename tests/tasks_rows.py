"""Rows of the topics data, as a stream would hand them to a task."""

from __future__ import annotations

from pathlib import Path

from dist_lm.config import SourceSpec
from dist_lm.data.rows import Rows
from dist_lm.data.stream import Stream
from dist_lm.data.training_set import TrainingSet


def stream_rows(data: Path, columns: tuple[str, ...], *, rank: int = 0, world_size: int = 1, count: int = 64) -> Rows:
    train = SourceSpec(path=str(data / "pairs" / "train"))
    with Stream(
        TrainingSet([train], seed=5, lanes=4, era=64),
        global_rows=count,
        rank=rank,
        world_size=world_size,
        partner_columns=columns,
    ) as stream:
        return next(stream).rows
