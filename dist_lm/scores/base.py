"""What one record adds to a set of metrics, and the figures of many records.

Enters: a prediction and what was expected.  Leaves: counts, and figures made of their sums.
Promises: counts of records add up, over ranks, slices and resamples; what does not add up, such as a
rank correlation, says so and keeps two numbers a record.  Logits never enter.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

Counts = Mapping[int, float]
"""Place -> count; places that are not named are 0."""
Table = dict[str, dict[str, float]]
"""Row -> column -> value."""
MOST_CLASSES = 50
"""Classes of which a training run keeps tables."""


class MetricSet(ABC):
    """The metrics of one task."""

    width: int
    """Counts of a record."""
    additive: ClassVar[bool] = True
    """Figures follow from the sums of the counts."""
    signature: str = ""
    """How the figures were made, for whoever compares them."""

    @abstractmethod
    def counts(self, predicted: Any, expected: Any) -> Counts:
        """What one record adds."""

    @abstractmethod
    def figures(self, totals: NDArray[np.float64]) -> dict[str, float]:
        """Figures of counts [width]; of counts [records, width] where they are not additive."""

    def table(self, totals: NDArray[np.float64]) -> Table:
        """Figures of each class, where there are classes."""
        return {}

    def confusion(self, totals: NDArray[np.float64]) -> Table:
        """Records of each expected class by predicted class, where each record has one."""
        return {}

    def of_records(self, rows: csr_array, times: NDArray[np.int64] | None = None) -> dict[str, float]:
        """Figures of records [records, width], each taken `times` often."""
        if self.additive:
            weights = np.ones(rows.shape[0]) if times is None else times.astype(np.float64)
            return self.figures(np.asarray(weights @ rows, dtype=np.float64))
        dense = rows.toarray()
        return self.figures(dense if times is None else np.repeat(dense, times, axis=0))


def as_rows(records: Sequence[Counts], width: int) -> csr_array:
    """Counts of records as a sparse matrix [records, width]."""
    row = [number for number, counts in enumerate(records) for _ in counts]
    column = [place for counts in records for place in counts]
    value = [float(count) for counts in records for count in counts.values()]
    return csr_array((value, (row, column)), shape=(len(records), width), dtype=np.float64)


class MetricState:
    """Metrics of the rows that this rank has judged."""

    def __init__(self, metrics: MetricSet) -> None:
        self.metrics = metrics
        self._totals = np.zeros(metrics.width)
        self._rows: list[NDArray[np.float64]] = []

    def add(self, predicted: Any, expected: Any) -> None:
        row = np.zeros(self.metrics.width)
        for place, count in self.metrics.counts(predicted, expected).items():
            row[place] = count
        if self.metrics.additive:
            self._totals += row
        else:
            self._rows.append(row)

    def counts(self) -> NDArray[np.float64]:
        """To be added up over ranks, or laid one after the other where the metrics are not additive."""
        if self.metrics.additive:
            return self._totals
        return np.array(self._rows).reshape(-1, self.metrics.width)

    def compute(self, parts: Sequence[NDArray[np.float64]]) -> dict[str, float]:
        """Figures of the counts of all ranks."""
        return self.metrics.figures(self._whole(parts))

    def tables(self, parts: Sequence[NDArray[np.float64]]) -> dict[str, Table]:
        """`classes` and `confusion`; of many classes none: they would fill a run's log."""
        if not self.metrics.additive:
            return {}
        whole = self._whole(parts)
        found = {"classes": self.metrics.table(whole), "confusion": self.metrics.confusion(whole)}
        return {name: table for name, table in found.items() if 0 < len(table) <= MOST_CLASSES}

    def _whole(self, parts: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        whole: NDArray[np.float64]
        whole = np.sum(parts, axis=0) if self.metrics.additive else np.concatenate(parts)
        return whole


def ratio(part: float, whole: float) -> float:
    """`part` of `whole`; 0 where there is nothing."""
    return float(part / whole) if whole else 0.0


def f1_of(right: float, predicted: float, expected: float) -> float:
    """Harmonic mean of precision and recall."""
    return ratio(2 * right, predicted + expected)
