"""Packed documents between the two phases: as Arrow batches on disk, and as arrays again.

Enters: PackedRows and the hashes of their documents; later, batches of one bucket.  Leaves: record
batches, a row a document, without padding; Documents.
Promises: what comes back are the documents that went in, in their order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_lm.data.kinds.base import PackedRows
from dist_lm.data.manifest import Column

LOST = 4
"""Counts of a document in PackedRows.lost."""


def schema(spec: Sequence[Column]) -> pa.Schema:
    """Of the batches of documents with these columns."""
    fixed = [
        ("hash_low", pa.uint64()),
        ("hash_high", pa.uint64()),
        ("lost", pa.list_(pa.int64(), LOST)),
        ("num_rows", pa.int64()),
    ]
    return pa.schema(fixed + [(f"column_{column.name}", pa.large_list(_item_type(column))) for column in spec])


def _item_type(column: Column) -> Any:
    """What one row of the column is."""
    number = pa.from_numpy_dtype(np.dtype(column.dtype))
    if column.lengths:
        return pa.large_list(number)
    return pa.list_(number, int(np.prod(column.shape))) if column.shape else number


def to_batch(packed: PackedRows, hashes: NDArray[np.uint64], spec: Sequence[Column]) -> pa.RecordBatch:
    """Documents with hashes [documents, 2], in their order; one without rows has its losses only."""
    starts = np.searchsorted(packed.document, np.arange(len(hashes) + 1)).astype(np.int64)
    arrays: list[Any] = [
        pa.array(hashes[:, 0]),
        pa.array(hashes[:, 1]),
        pa.FixedSizeListArray.from_arrays(pa.array(packed.lost.reshape(-1)), LOST),
        pa.array(np.diff(starts)),
    ]
    for column in spec:
        values = packed.columns[column.name]
        if column.lengths:
            lengths = packed.columns[column.lengths].astype(np.int64)
            filled = np.arange(values.shape[1]) < lengths[:, None]
            ends = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
            items: Any = pa.LargeListArray.from_arrays(pa.array(ends), pa.array(values[filled]))
        elif column.shape:
            items = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), int(np.prod(column.shape)))
        else:
            items = pa.array(values)
        arrays.append(pa.LargeListArray.from_arrays(pa.array(starts), items))
    return pa.RecordBatch.from_arrays(arrays, schema=schema(spec))


@dataclass
class Documents:
    """Documents of one bucket as arrays."""

    hashes: NDArray[np.uint64]
    """[documents, 2]"""
    lost: NDArray[np.int64]
    """[documents, 4]"""
    num_rows: NDArray[np.int64]
    """[documents]"""
    values: dict[str, NDArray[Any]]
    """By column: [rows, *shape], or what the rows of a column with lengths hold, end to end."""

    @classmethod
    def from_batch(cls, batch: pa.RecordBatch, spec: Sequence[Column]) -> Documents:
        values = {}
        for column in spec:
            array = batch.column(f"column_{column.name}").flatten()
            if column.lengths or column.shape:
                array = array.flatten()
            # A copy: the batch may be a view of a file.
            plain = array.to_numpy(zero_copy_only=False).astype(column.dtype, copy=True)
            values[column.name] = plain if column.lengths else plain.reshape(-1, *column.shape)
        hashes = np.stack([batch.column("hash_low").to_numpy(), batch.column("hash_high").to_numpy()], axis=1)
        lost = batch.column("lost").flatten().to_numpy().reshape(-1, LOST)
        return cls(hashes, lost, batch.column("num_rows").to_numpy(), values)

    @classmethod
    def concat(cls, parts: Sequence[Documents]) -> Documents:
        """One after the other; there must be one."""
        return cls(
            np.concatenate([part.hashes for part in parts]),
            np.concatenate([part.lost for part in parts]),
            np.concatenate([part.num_rows for part in parts]),
            {name: np.concatenate([part.values[name] for part in parts]) for name in parts[0].values},
        )


def renumber(documents: Documents, label_columns: Sequence[str], places: NDArray[Any]) -> None:
    """Replace label number n by `places[n]`; numbers that no label has stay."""
    for name in label_columns:
        if name in documents.values:
            renumber_labels(documents.values[name], places)


def renumber_labels(numbers: NDArray[Any], places: NDArray[Any]) -> None:
    """In place."""
    labelled = (numbers >= 0) & (numbers < len(places))
    numbers[labelled] = places[numbers[labelled]].astype(numbers.dtype)


def take_rows(
    documents: Documents, which: NDArray[np.int64], spec: Sequence[Column], starts: Mapping[str, NDArray[np.int64]]
) -> dict[str, NDArray[Any]]:
    """Rows as padded arrays [rows, *shape].  `starts` says where the rows of a column with lengths begin."""
    columns = {}
    for column in spec:
        if not column.lengths:
            columns[column.name] = documents.values[column.name][which]
            continue
        lengths = documents.values[column.lengths][which].astype(np.int64)
        array = np.zeros((len(which), *column.shape), dtype=column.dtype)
        begins = np.cumsum(lengths) - lengths
        places = np.repeat(starts[column.name][which] - begins, lengths) + np.arange(int(lengths.sum()))
        array[np.arange(column.shape[0]) < lengths[:, None]] = documents.values[column.name][places]
        columns[column.name] = array
    return columns


def row_starts(documents: Documents, spec: Sequence[Column]) -> dict[str, NDArray[np.int64]]:
    """For `take_rows`."""
    lengths = {column.name: documents.values[column.lengths].astype(np.int64) for column in spec if column.lengths}
    return {name: np.cumsum(array) - array for name, array in lengths.items()}
