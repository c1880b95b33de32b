"""How sure a figure is: confidence intervals from resampled records, and figures of slices.

Enters: counts of records [records, width].  Leaves: figures with the interval of 95 %.
Promises: the same counts and seed give the same interval, on any machine and number of ranks: the
draws are a keyed hash, no generator.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from dist_lm.data.order import keyed_hash
from dist_lm.scores.base import MetricSet

_DRAW = 401
_INTERVAL = (2.5, 97.5)


def intervals(metrics: MetricSet, rows: csr_array, *, resamples: int, seed: int) -> dict[str, tuple[float, float]]:
    """Bounds of each figure over `resamples` draws of as many records, with replacement."""
    drawn = [metrics.of_records(rows, _times(rows.shape[0], number, seed)) for number in range(resamples)]
    bounds: dict[str, tuple[float, float]] = {}
    for name in drawn[0] if drawn else ():
        # A figure that a draw does not have, such as that of questions without answer, is left out of it.
        values = [figures[name] for figures in drawn if name in figures]
        low, high = np.percentile(values, _INTERVAL)
        bounds[name] = (float(low), float(high))
    return bounds


def _times(count: int, number: int, seed: int) -> NDArray[np.int64]:
    """How often each of `count` records is drawn."""
    draws = keyed_hash(seed, _DRAW, number, np.arange(count, dtype=np.uint64)) % np.uint64(max(count, 1))
    return np.bincount(draws.astype(np.int64), minlength=count)


def summary(metrics: MetricSet, rows: csr_array, *, resamples: int, seed: int) -> dict[str, Any]:
    """Figures of some records, JSON values: records, figures, intervals."""
    bounds = intervals(metrics, rows, resamples=resamples, seed=seed)
    return {
        "records": rows.shape[0],
        "figures": metrics.of_records(rows),
        "intervals": {name: list(bound) for name, bound in bounds.items()},
    }
