"""Rows in memory: what the streams hand to a task.

Enters: arrays with one entry a row.  Leaves: the same rows, sliced or picked.  Promises: all arrays
of a Rows have the same length, and a row keeps its identity wherever it goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

PARTNER_PREFIX = "partner_"
"""Column `partner_x` of a row is column x of its partner, another row of the same block."""


@dataclass(frozen=True)
class Rows:
    """R rows of a data set."""

    columns: dict[str, NDArray[Any]]
    """By name, [R, *shape]."""
    sample_id: NDArray[np.uint64]
    """[R]; the row's place in the data set, the shards laid end to end.  The same in every epoch."""
    epoch: NDArray[np.int64]
    """[R]; how often the row was seen before."""
    real: NDArray[np.bool_]
    """[R]; False for a filler row, which must weigh nothing: it repeats some real row."""

    def __len__(self) -> int:
        return len(self.sample_id)

    def take(self, which: slice | NDArray[Any]) -> Rows:
        """The rows of a slice (views) or of an index array (copies)."""
        columns = {name: array[which] for name, array in self.columns.items()}
        return Rows(columns, self.sample_id[which], self.epoch[which], self.real[which])

    def padded(self, num_rows: int) -> Rows:
        """These rows and fillers, `num_rows` together; there must be a row to repeat."""
        if len(self) >= num_rows:
            return self
        which = np.minimum(np.arange(num_rows), len(self) - 1)
        rows = self.take(which)
        return Rows(rows.columns, rows.sample_id, rows.epoch, rows.real & (np.arange(num_rows) < len(self)))

    def as_fillers(self) -> Rows:
        return Rows(self.columns, self.sample_id, self.epoch, np.zeros(len(self), dtype=np.bool_))


def concat(parts: Sequence[Rows]) -> Rows:
    """Rows of the same columns, one part after the other."""
    if len(parts) == 1:
        return parts[0]
    return Rows(
        {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        np.concatenate([part.sample_id for part in parts]),
        np.concatenate([part.epoch for part in parts]),
        np.concatenate([part.real for part in parts]),
    )


@dataclass(frozen=True)
class StepRows:
    """One rank's rows of one global batch."""

    position: int
    """Where the global batch begins in the stream."""
    next_position: int
    """Where the next one begins: the position to save once this batch is trained on."""
    rows: Rows
