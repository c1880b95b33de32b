"""Files of documents grouped by bucket: what a map task leaves for the reduce tasks.

Enters: batches of documents, each with its bucket.  Leaves: `<task>-<part>.batches`, a record batch
for each bucket, one behind the other, and `.idx`, uint64 offsets of the buckets and the end.
Promises: memory holds one part; one bucket of a part is read by two small reads; a file appears whole
or not at all, and its hash is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dist_lm.disk import WholeFile, disk_errors, sha256_of, sync_folder

_OFFSET = np.dtype("<u8")


@dataclass(frozen=True)
class Part:
    """One file and its index, as the task that wrote them remembers them."""

    name: str
    sha256: str
    index_sha256: str

    def is_whole(self, folder: Path) -> bool:
        """Reads every byte."""
        files = ((folder / self.name, self.sha256), (folder / index_name(self.name), self.index_sha256))
        return all(path.is_file() and sha256_of(path) == digest for path, digest in files)


def part_name(task: int, part: int) -> str:
    return f"{task:06d}-{part:04d}.batches"


def index_name(name: str) -> str:
    return name + ".idx"


class PartWriter:
    """Writes the parts of one task."""

    def __init__(self, folder: Path, task: int, schema: pa.Schema, num_buckets: int, part_bytes: int) -> None:
        self.parts: list[Part] = []
        self._folder = folder
        self._task = task
        self._schema = schema
        self._num_buckets = num_buckets
        self._part_bytes = part_bytes
        self._batches: list[Any] = []
        self._buckets: list[NDArray[np.int64]] = []
        self._bytes = 0

    def add(self, batch: pa.RecordBatch, buckets: NDArray[np.int64]) -> None:
        """`buckets` [documents of the batch]."""
        self._batches.append(batch)
        self._buckets.append(buckets)
        self._bytes += batch.nbytes
        if self._bytes >= self._part_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what is held as one part."""
        if not self._batches:
            return
        buckets = np.concatenate(self._buckets)
        order = np.argsort(buckets, kind="stable")
        table = pa.Table.from_batches(self._batches, self._schema)
        self._batches, self._buckets, self._bytes = [], [], 0
        ends = np.cumsum(np.bincount(buckets, minlength=self._num_buckets))
        path = self._folder / part_name(self._task, len(self.parts))
        offsets = [0]
        with disk_errors(path):
            with WholeFile(path) as file:
                for end, count in zip(ends, np.diff(ends, prepend=0), strict=True):
                    if count:
                        # A bucket at a time: one copy of the part in memory is enough.
                        chosen = table.take(pa.array(order[end - count : end])).combine_chunks()
                        file.write(memoryview(chosen.to_batches()[0].serialize()))
                    offsets.append(file.size)
            with WholeFile(self._folder / index_name(path.name)) as index:
                index.write(np.asarray(offsets, dtype=_OFFSET).tobytes())
            sync_folder(self._folder)
        self.parts.append(Part(path.name, file.sha256, index.sha256))


def read_bucket(path: Path, bucket: int, schema: pa.Schema) -> pa.RecordBatch | None:
    """The documents of a bucket in one part; None where there is none."""
    with disk_errors(path, "read a part"):
        with open(path.with_name(index_name(path.name)), "rb") as index:
            index.seek(bucket * _OFFSET.itemsize)
            begin, end = np.frombuffer(index.read(2 * _OFFSET.itemsize), _OFFSET)
        if begin == end:
            return None
        with open(path, "rb") as file:
            file.seek(int(begin))
            content = file.read(int(end - begin))
    return pa.ipc.read_record_batch(pa.py_buffer(content), schema)
