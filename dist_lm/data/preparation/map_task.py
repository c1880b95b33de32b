"""The first phase: one split of the input becomes packed documents, grouped by bucket.

Enters: the file of a job and the number of a split.  Leaves: parts on disk, and a MapSummary.
Promises: run again, it does nothing if what it left verifies.  The bucket of a document is a function
of its content and the seed alone: equal documents meet, and the order is one global shuffle.
Memory: a batch of documents while they are tokenised, and `part_bytes` of packed ones; or the largest
document.  It does not grow with the split.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from dist_lm.data.kinds.base import Empty, PackedRows, Unusable
from dist_lm.data.order import keyed_hash
from dist_lm.data.preparation.documents import renumber_labels, schema, to_batch
from dist_lm.data.preparation.filters import text_fault, token_fault
from dist_lm.data.preparation.job import Job, WorkFolder, json_of, load_job, load_job_tokenizer
from dist_lm.data.preparation.parts import Part, PartWriter
from dist_lm.data.sources.inputs import read_split
from dist_lm.data.sources.record import BadRecords, TooManyBad
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.disk import write_bytes

# What a hash is for stands after the seed.
_SPLIT, _SHUFFLE = 301, 302
_BATCH_DOCUMENTS, _BATCH_CHARACTERS = 512, 1 << 20
READ, EMPTY, BAD = "documents read", "empty documents", "bad records"


@dataclass
class MapSummary:
    """What became of a split."""

    counts: dict[str, int] = field(default_factory=dict)
    bad_count: int = 0
    bad_examples: list[str] = field(default_factory=list)
    stopped: bool = False
    """There were more bad records than allowed: the rest was not read."""
    labels: list[str] = field(default_factory=list)
    """Names that the label columns of these parts number."""
    bucket_rows: list[int] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)


_ADAPTER: TypeAdapter[MapSummary] = TypeAdapter(MapSummary)


def map_split(job_path: Path, number: int) -> MapSummary:
    """Do split `number` of the job, or find it done."""
    work, job = WorkFolder(job_path.parent), load_job(job_path)
    path = work.map / f"{number:06d}.json"
    done = load_summary(path)
    if done is not None and all(part.is_whole(work.map) for part in done.parts):
        return done
    summary = _Mapper(work, job, load_job_tokenizer(job_path), number).run()
    if not summary.stopped:
        write_bytes(path, json_of(summary))
    return summary


def load_summary(path: Path) -> MapSummary | None:
    try:
        return _ADAPTER.validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


class _Mapper:
    """The work on one split."""

    def __init__(self, work: WorkFolder, job: Job, tokenizer: Tokenizer, number: int) -> None:
        self._job = job
        self._kind = job.kind
        self._tokenizer = tokenizer
        self._split = job.splits[number]
        self._spec = self._kind.columns(job.rules)
        self._bad = BadRecords(job.max_bad)
        self._counts: Counter[str] = Counter()
        self._labels: dict[str, int] = {}
        num_buckets = sum(job.num_buckets)
        self._bucket_rows = np.zeros(num_buckets, dtype=np.int64)
        self._writer = PartWriter(work.map, number, schema(self._spec), num_buckets, job.part_bytes)

    def run(self) -> MapSummary:
        stopped = False
        try:
            for records in _batches(self._records()):
                self._pack(records)
            self._writer.flush()
        except TooManyBad:
            stopped = True
        return MapSummary(
            dict(self._counts),
            self._bad.count,
            self._bad.examples,
            stopped,
            list(self._labels),
            self._bucket_rows.tolist(),
            self._writer.parts,
        )

    def _records(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Usable records, and their characters."""
        job, kind = self._job, self._kind
        for record in read_split(self._split, job.settings, self._bad):
            try:
                cleaned = kind.clean(record.fields, job.rules)
            except Empty:
                self._counts.update((READ, EMPTY))
                continue
            except Unusable as reason:
                self._bad.add(record.where, str(reason))
                continue
            self._counts[READ] += 1
            text = kind.text(cleaned)
            fault = text_fault(text, job.filters) if job.filters else None
            if fault:
                self._counts[f"documents beyond {fault}"] += 1
            else:
                yield cleaned, len(text)

    def _pack(self, records: list[dict[str, Any]]) -> None:
        job, kind = self._job, self._kind
        packed = kind.pack(records, self._tokenizer, job.rules)
        hashes = np.array([_content_hash(kind.content(record)) for record in records], dtype=np.uint64)
        if packed.labels:
            places = [self._labels.setdefault(name, len(self._labels)) for name in packed.labels]
            for name in kind.label_columns:
                if name in packed.columns:
                    renumber_labels(packed.columns[name], np.array(places))
        buckets = bucket_of(hashes[:, 0], job)
        batch = to_batch(packed, hashes, self._spec)
        kept = self._within_token_limits(packed, len(records))
        if not kept.all():
            batch, buckets = batch.filter(kept), buckets[kept]
        rows = batch.column("num_rows").to_numpy()
        self._bucket_rows += np.bincount(buckets, weights=rows, minlength=len(self._bucket_rows)).astype(np.int64)
        self._writer.add(batch, buckets)

    def _within_token_limits(self, packed: PackedRows, num_documents: int) -> NDArray[np.bool_]:
        kept = np.ones(num_documents, dtype=np.bool_)
        if not any(name.endswith("document_tokens") for name in self._job.filters):
            return kept
        tokens = packed.lost[:, 1] + packed.lost[:, 3]
        for column in self._spec:
            if column.name in self._kind.token_columns:
                weights = packed.columns[column.lengths] if column.lengths else np.ones(len(packed.document))
                tokens += np.bincount(packed.document, weights=weights, minlength=num_documents).astype(np.int64)
        for document, count in enumerate(tokens):
            fault = token_fault(int(count), self._job.filters)
            if fault:
                self._counts[f"documents beyond {fault}"] += 1
                kept[document] = False
        return kept


def bucket_of(hashes: NDArray[np.uint64], job: Job) -> NDArray[np.int64]:
    """The buckets of documents with these hashes; those of the held-out set are the last."""
    held = keyed_hash(job.seed, _SPLIT, hashes).astype(np.float64) / 2.0**64 < job.heldout_fraction
    # The high half of the shuffle key: buckets in their order, each sorted by the key, are the shuffle.
    high = document_keys(hashes, job.seed) >> np.uint64(32)
    train, heldout = (np.uint64(count) for count in job.num_buckets)
    bucket = np.where(held, train + (high * heldout >> np.uint64(32)), high * train >> np.uint64(32))
    return bucket.astype(np.int64)


def document_keys(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """By which documents are shuffled."""
    return keyed_hash(seed, _SHUFFLE, hashes)


def row_keys(hashes: NDArray[np.uint64], ordinals: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """By which rows are shuffled inside their bucket."""
    return keyed_hash(seed, _SHUFFLE, hashes, ordinals)


def _content_hash(content: str) -> tuple[int, int]:
    digest = hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _batches(records: Iterator[tuple[dict[str, Any], int]]) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    characters = 0
    for record, length in records:
        batch.append(record)
        characters += length
        if len(batch) >= _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
