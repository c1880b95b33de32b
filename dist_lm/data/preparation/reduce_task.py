"""The second phase: one bucket becomes the next shards of a data set.

Enters: the files of a job and of its first phase, a bucket, the numbers of its shards.
Leaves: the shards in OUT/train or OUT/heldout, and a ReduceSummary.
Promises: of equal documents the first in the order of the input stays; rows are sorted by their
shuffle key; run again, it does nothing if its shards verify.
Memory: the different documents of the bucket two times, the bucket of one part, and a shard's rows with
their padding.  How often a document is repeated does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from dist_lm.data.kinds.base import Kind
from dist_lm.data.manifest import ShardEntry
from dist_lm.data.preparation.documents import Documents, renumber, row_starts, schema, take_rows
from dist_lm.data.preparation.job import Job, PartsOfMap, WorkFolder, json_of, load_job, load_parts
from dist_lm.data.preparation.map_task import document_keys, row_keys
from dist_lm.data.preparation.parts import read_bucket
from dist_lm.data.shards import write_shard
from dist_lm.disk import sha256_of, write_bytes

KEPT, DUPLICATE = "documents kept", "duplicate documents"
LOST = ("rows too short", "tokens in rows too short", "ends of texts too long", "tokens in those ends")


class Bucket(NamedTuple):
    """What one task makes."""

    number: int
    first_shard: int
    """Number of its first shard."""
    num_shards: int


@dataclass
class ReduceSummary:
    """What became of a bucket."""

    counts: dict[str, int] = field(default_factory=dict)
    num_tokens: int = 0
    label_counts: dict[int, int] = field(default_factory=dict)
    """How often each label stands in the rows, by its number."""
    shards: list[ShardEntry] = field(default_factory=list)


_ADAPTER: TypeAdapter[ReduceSummary] = TypeAdapter(ReduceSummary)


def reduce_bucket(job_path: Path, parts_path: Path, bucket: Bucket) -> ReduceSummary:
    """Make the shards of a bucket, or find them made."""
    work, job = WorkFolder(job_path.parent), load_job(job_path)
    folder = work.out / job.name_of(bucket.number)
    path = work.reduce / f"{bucket.number:06d}.json"
    done = _load(path)
    if done is not None and all(_is_whole(folder, entry) for entry in done.shards):
        return done
    documents, num_duplicates = _read(work, job, load_parts(parts_path), bucket.number)
    summary = ReduceSummary()
    if documents is not None:
        summary.counts = _counts(documents, num_duplicates)
        rows = _ordered_rows(documents, job)
        for number, which in enumerate(_shares(rows, documents, bucket.num_shards, job.kind)):
            if len(which):
                _write(folder, bucket.first_shard + number, documents, which, job, summary)
    write_bytes(path, json_of(summary))
    return summary


def _load(path: Path) -> ReduceSummary | None:
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


def _is_whole(folder: Path, entry: ShardEntry) -> bool:
    files = ((folder / entry.name, entry.sha256), (folder / entry.index_name, entry.index_sha256))
    return all(path.is_file() and sha256_of(path) == digest for path, digest in files)


def _read(work: WorkFolder, job: Job, parts: PartsOfMap, bucket: int) -> tuple[Documents | None, int]:
    """The documents of a bucket in the order of the input, of equal ones the first; how many others there are.

    None where the bucket is empty.
    """
    kind = job.kind
    spec = kind.columns(job.rules)
    found, num_duplicates = [], 0
    seen: set[bytes] = set()
    for part in parts.parts:
        batch = read_bucket(work.map / part.name, bucket, schema(spec))
        if batch is not None:
            # At once: an input may repeat a document without end.
            new = _first_of_equals(batch, seen)
            num_duplicates += len(new) - int(new.sum())
            if not new.any():
                continue
            documents = Documents.from_batch(batch if new.all() else batch.filter(pa.array(new)), spec)
            renumber(documents, kind.label_columns, np.array(part.label_places, dtype=np.int64))
            found.append(documents)
    return (Documents.concat(found) if found else None), num_duplicates


def _first_of_equals(batch: pa.RecordBatch, seen: set[bytes]) -> NDArray[np.bool_]:
    """Which documents are neither in `seen` nor equal to one before them; they are added to `seen`."""
    hashes = np.stack([batch.column("hash_low").to_numpy(), batch.column("hash_high").to_numpy()], axis=1)
    content, size = hashes.tobytes(), hashes.itemsize * hashes.shape[1]
    new = np.zeros(len(hashes), dtype=np.bool_)
    for number in range(len(hashes)):
        key = content[number * size : (number + 1) * size]
        if key not in seen:
            seen.add(key)
            new[number] = True
    return new


def _counts(documents: Documents, num_duplicates: int) -> dict[str, int]:
    lost = documents.lost.sum(axis=0)
    counts = {KEPT: len(documents.hashes), DUPLICATE: num_duplicates}
    return counts | {name: int(count) for name, count in zip(LOST, lost, strict=True)}


def _ordered_rows(documents: Documents, job: Job) -> NDArray[np.int64]:
    """Rows of the documents, in the order of the shuffle."""
    starts = np.cumsum(documents.num_rows) - documents.num_rows
    low, high = documents.hashes[:, 0], documents.hashes[:, 1]
    if job.kind.whole_documents:
        # Documents with equal keys are in the order of their other half.
        moved = np.lexsort((high, low, document_keys(low, job.seed)))
        return _ranges(starts[moved], documents.num_rows[moved])
    document = np.repeat(np.arange(len(low)), documents.num_rows)
    ordinal = np.arange(len(document)) - starts[document]
    keys = row_keys(low[document], ordinal.astype(np.uint64), job.seed)
    return np.lexsort((ordinal, high[document], low[document], keys))


def _ranges(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """start, start + 1, ... of each range, one behind the other."""
    begins = np.cumsum(counts) - counts
    return np.repeat(starts - begins, counts) + np.arange(int(counts.sum()))


def _shares(rows: NDArray[np.int64], documents: Documents, num_shards: int, kind: Kind) -> list[NDArray[np.int64]]:
    """The rows of each shard: equal shares, except that whole documents are not parted."""
    cuts = np.arange(1, num_shards) * len(rows) // max(num_shards, 1)
    if kind.whole_documents and len(rows):
        # Where in the order of the shuffle a document begins.
        starts = np.flatnonzero(np.isin(rows, np.cumsum(documents.num_rows) - documents.num_rows))
        cuts = starts[np.minimum(np.searchsorted(starts, cuts), len(starts) - 1)]
    return np.split(rows, cuts)


def _write(
    folder: Path, number: int, documents: Documents, which: NDArray[np.int64], job: Job, summary: ReduceSummary
) -> None:
    kind = job.kind
    spec = kind.columns(job.rules)
    columns: dict[str, NDArray[Any]] = kind.join(take_rows(documents, which, spec, row_starts(documents, spec)))
    summary.shards.append(write_shard(folder, number, columns, spec=spec, block_rows=job.block_rows))
    for column in spec:
        if column.name in kind.label_columns:
            found = columns[column.name]
            if column.lengths:
                found = found[np.arange(found.shape[1]) < columns[column.lengths][:, None]]
            for label, count in zip(*np.unique(found, return_counts=True), strict=True):
                summary.label_counts[int(label)] = summary.label_counts.get(int(label), 0) + int(count)
        if column.name in kind.token_columns:
            summary.num_tokens += int(columns[column.lengths].sum(dtype=np.int64)) if column.lengths else len(which)
