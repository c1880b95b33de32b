"""Rows of different lengths as one padded array.

Enters: lists of numbers.  Leaves: an array [rows, capacity] and the lengths [rows].
Promises: places behind a row's length hold the padding value.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray


def padded(
    rows: Sequence[Sequence[int]], capacity: int, fill: int, dtype: DTypeLike
) -> tuple[NDArray[Any], NDArray[np.uint16]]:
    """The rows as one array, padded at the end, and their lengths; no row is longer than `capacity`."""
    lengths = np.fromiter(map(len, rows), dtype=np.uint16, count=len(rows))
    array = np.full((len(rows), capacity), fill, dtype=dtype)
    if rows:
        filled = np.arange(capacity) < lengths[:, None]
        array[filled] = np.fromiter(chain.from_iterable(rows), dtype=dtype, count=int(lengths.sum()))
    return array, lengths
