"""Metrics of classes and of numbers: accuracy, macro F1, Matthews, Pearson, Spearman.

Enters: predicted and expected class numbers, sets of them, or values.  Leaves: figures as scikit-learn
and scipy define them.  Promises: a class that neither side names takes no part in macro F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from dist_lm.scores.base import Counts, MetricSet, Table, f1_of, ratio


class OneClass(MetricSet):
    """Counts are the confusion matrix, expected class by predicted class."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.width = len(self.labels) ** 2

    def counts(self, predicted: int, expected: int) -> Counts:
        return {expected * len(self.labels) + predicted: 1.0}

    def figures(self, totals: NDArray[np.float64]) -> dict[str, float]:
        matrix = totals.reshape(len(self.labels), -1)
        count, right = matrix.sum(), np.trace(matrix)
        expected, predicted = matrix.sum(axis=1), matrix.sum(axis=0)
        present = (expected + predicted) > 0
        f1 = [f1_of(matrix[c, c], predicted[c], expected[c]) for c in np.flatnonzero(present)]
        spread = (count**2 - (predicted**2).sum()) * (count**2 - (expected**2).sum())
        return {
            "accuracy": ratio(right, count),
            "macro_f1": float(np.mean(f1)) if f1 else 0.0,
            "mcc": ratio(right * count - predicted @ expected, spread**0.5),
        }

    def table(self, totals: NDArray[np.float64]) -> Table:
        matrix = totals.reshape(len(self.labels), -1)
        return {
            label: class_figures(matrix[c, c], matrix[:, c].sum(), matrix[c].sum())
            for c, label in enumerate(self.labels)
        }

    def confusion(self, totals: NDArray[np.float64]) -> Table:
        matrix = totals.reshape(len(self.labels), -1).tolist()
        return {label: dict(zip(self.labels, row, strict=True)) for label, row in zip(self.labels, matrix, strict=True)}


class ManyClasses(MetricSet):
    """Counts a class: right, predicted, expected; then records that are right altogether, and records."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.width = 3 * len(self.labels) + 2

    def counts(self, predicted: Sequence[int], expected: Sequence[int]) -> Counts:
        counts: dict[int, float] = {}
        for place, chosen in enumerate((set(predicted) & set(expected), set(predicted), set(expected))):
            counts |= {3 * number + place: 1.0 for number in chosen}
        counts[self.width - 2] = float(set(predicted) == set(expected))
        counts[self.width - 1] = 1.0
        return counts

    def figures(self, totals: NDArray[np.float64]) -> dict[str, float]:
        right, predicted, expected = totals[:-2].reshape(-1, 3).T
        macro = [f1_of(*counts) for counts in zip(right, predicted, expected, strict=True)]
        return {
            "exact_match": ratio(totals[-2], totals[-1]),
            "micro_f1": f1_of(right.sum(), predicted.sum(), expected.sum()),
            "macro_f1": float(np.mean(macro)),
        }

    def table(self, totals: NDArray[np.float64]) -> Table:
        rows = totals[:-2].reshape(-1, 3)
        return {label: class_figures(*row) for label, row in zip(self.labels, rows, strict=True)}


class Numbers(MetricSet):
    """Two numbers a record, predicted and expected: ranks do not add up."""

    width = 2
    additive: ClassVar[bool] = False

    def counts(self, predicted: float, expected: float) -> Counts:
        return {0: float(predicted), 1: float(expected)}

    def figures(self, totals: NDArray[np.float64]) -> dict[str, float]:
        from scipy.stats import rankdata

        predicted, expected = totals.T
        return {
            "pearson": _correlation(predicted, expected),
            "spearman": _correlation(rankdata(predicted), rankdata(expected)),
            "mse": float(np.mean((predicted - expected) ** 2)) if len(totals) else 0.0,
        }


def class_figures(right: float, predicted: float, expected: float) -> dict[str, float]:
    """One line of a table of classes; `count` is how many were expected."""
    return {
        "precision": ratio(right, predicted),
        "recall": ratio(right, expected),
        "f1": f1_of(right, predicted, expected),
        "count": float(expected),
    }


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    """Pearson's; 0 where one side does not vary."""
    if len(left) < 2:
        return 0.0
    a, b = left - left.mean(), right - right.mean()
    return ratio(float(a @ b), float((a @ a) * (b @ b)) ** 0.5)
