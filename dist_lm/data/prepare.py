"""Text to shards: read, drop duplicates, split, tokenise, shuffle, write.

Enters: files of text and a tokenizer.  Leaves: OUT/train and OUT/heldout, each a data set.
Promises: the same inputs and options give the same bytes, whatever the number of workers and however
often the work was killed; what was dropped is counted with the reason.

The rows are held in memory (2 bytes a token and slot); the tokenising runs in a pool of processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.kinds.base import PackedRows, PackingRules
from dist_lm.data.kinds.registry import kind_named
from dist_lm.data.manifest import MANIFEST_NAME, Manifest
from dist_lm.data.order import keyed_hash
from dist_lm.data.process_pool import Progress, available_cores, ordered_map, silent
from dist_lm.data.shards import verify_dataset, write_shard
from dist_lm.data.sources import BadRecords, list_inputs, read_records
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.disk import disk_errors, sha256_of
from dist_lm.errors import ConfigError, DataError

log = logging.getLogger(__name__)

_LARGEST_UINT16_VOCABULARY = 65536
_DOCUMENTS_A_TASK = 512
_SPLIT, _SHUFFLE = 301, 302
TRAIN, HELDOUT = "train", "heldout"


@dataclass(frozen=True)
class PrepareOptions:
    """What to make, and of what."""

    inputs: list[str]
    out: Path
    tokenizer: Path
    kind: str = "pairs"
    seq_len: int = 128
    """Tokens of a model input, special tokens included."""
    heldout_fraction: float = 0.02
    """Share of the documents, chosen by their content, that goes to OUT/heldout."""
    text_field: str = "text"
    label_field: str = "label"
    min_tokens: int | None = None
    """Rows with fewer are dropped; None: as the kind has it."""
    max_bad: int = 0
    """Records that may be unusable."""
    block_rows: int | None = None
    shard_rows: int | None = None
    """None: as the kind has it."""
    workers: int | None = None
    """Processes; None: one a core.  Not part of the result."""
    seed: int = 0


@dataclass
class PrepareReport:
    """What was kept, dropped and why; rows and tokens by split."""

    up_to_date: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    out: Path = Path()

    def __str__(self) -> str:
        lines = [f"{self.out} is up to date: verified, nothing to do"] if self.up_to_date else []
        lines += [
            f"{name:8} {facts['rows']} rows, {facts['tokens']} tokens, {facts['shards']} shards, "
            f"{100 * facts['padding'] / max(facts['slots'], 1):.1f}% padding"
            for name, facts in self.splits.items()
        ]
        lines += [
            f"{'dropped' if name != 'documents read' else 'read':8} {count} {name}"
            for name, count in self.counts.items()
            if count
        ]
        return "\n".join(lines)


@dataclass
class _Documents:
    """Texts in the order of their first appearance, without duplicates."""

    texts: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    read: int = 0
    duplicates: int = 0


def prepare(options: PrepareOptions, progress: Progress = silent) -> PrepareReport:
    """Make the data sets, or say that they are there.

    Raises DataError for unusable input, ConfigError where OUT holds something else, EnvironmentFault
    where the disk refuses.
    """
    _check_options(options)
    tokenizer = load_tokenizer(options.tokenizer)
    identity = _identity(options, tokenizer)
    done = _finished(options, identity)
    if done is not None:
        return done
    bad = BadRecords(options.max_bad)
    documents = _read(options, bad, progress)
    rules = _rules(options, tokenizer)
    rows = _tokenise(documents, options, rules, progress)
    report = PrepareReport(counts=_counts(documents, rows, bad), out=options.out)
    hashes = np.array(documents.hashes, dtype=np.uint64)
    draw = keyed_hash(options.seed, _SPLIT, hashes).astype(np.float64) / 2.0**64
    held = draw < options.heldout_fraction
    # The held-out set is published last: where it is, all is there.
    for name, chosen in ((TRAIN, ~held), (HELDOUT, held)):
        if name == HELDOUT and not options.heldout_fraction:
            continue
        manifest = _write_split(options, rules, name, rows, chosen, hashes, tokenizer, identity, report)
        report.splits[name] = _facts(manifest)
    return report


def _check_options(options: PrepareOptions) -> None:
    kind_named(options.kind)
    if not 0.0 <= options.heldout_fraction < 1.0:
        raise ConfigError(
            f"a share of {options.heldout_fraction} cannot be held out", where="--heldout", do="Write 0.02."
        )
    if options.seq_len < 16:
        raise ConfigError(f"rows of {options.seq_len} tokens are too short", where="--seq-len", do="Write 16 or more.")


def _identity(options: PrepareOptions, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the result."""
    plain = asdict(options)
    for name in ("inputs", "out", "tokenizer", "workers", "max_bad"):
        plain.pop(name)
    inputs = [sha256_of(path) for path in list_inputs(options.inputs)]
    return {**plain, "tokenizer_sha256": tokenizer.sha256, "inputs_sha256": inputs}


def _finished(options: PrepareOptions, identity: dict[str, Any]) -> PrepareReport | None:
    """A report if all is there and verified; None if there is work.  Refuses a folder of another kind."""
    names = [TRAIN] + ([HELDOUT] if options.heldout_fraction else [])
    found: dict[str, Manifest] = {}
    for name in names:
        folder = options.out / name
        if not (folder / MANIFEST_NAME).exists():
            continue
        manifest = Manifest.load(folder)
        _refuse_other(folder, manifest.preparation.get("identity", {}), identity)
        try:
            found[name] = verify_dataset(folder)
        except DataError as error:
            log.warning("%s is prepared again: %s (%s)", folder, error.what, error.where)
            (folder / MANIFEST_NAME).unlink()
    if len(found) < len(names):
        return None
    counts = found[TRAIN].preparation["counts"]
    return PrepareReport(True, counts, {name: _facts(manifest) for name, manifest in found.items()}, options.out)


def _refuse_other(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = [
        f"{name}: {json.dumps(old.get(name))} -> {json.dumps(new[name])}" for name in new if old.get(name) != new[name]
    ]
    if changed:
        raise ConfigError(
            "the folder holds a data set made of other inputs or with other options",
            where=str(folder),
            why="\n".join(line[:100] for line in changed[:4]),
            do="Choose another --out, or remove this folder.",
        )


def _read(options: PrepareOptions, bad: BadRecords, progress: Progress) -> _Documents:
    documents = _Documents()
    seen: set[int] = set()
    need_label = options.kind == "classification"
    records = read_records(
        options.inputs,
        text_field=options.text_field,
        label_field=options.label_field,
        need_label=need_label,
        bad=bad,
    )
    for record in records:
        documents.read += 1
        key = f"{record.label}\0{record.text}" if need_label else record.text
        digest = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little")
        if digest in seen:
            documents.duplicates += 1
            continue
        seen.add(digest)
        documents.texts.append(record.text)
        documents.hashes.append(digest)
        if need_label:
            documents.labels.append(str(record.label))
        if documents.read % 5000 == 0:
            progress("reading", documents.read, None)
    if not documents.texts:
        raise DataError(
            "there is no usable text in the input",
            where=", ".join(options.inputs),
            why="\n".join(bad.examples),
            do="Name files that hold text; `--text-field` names the field of a jsonl record.",
        )
    return documents


def _rules(options: PrepareOptions, tokenizer: Tokenizer) -> PackingRules:
    kind = kind_named(options.kind)
    return PackingRules(
        seq_len=options.seq_len,
        min_tokens=kind.min_tokens if options.min_tokens is None else options.min_tokens,
        token_dtype="uint16" if tokenizer.vocab_size <= _LARGEST_UINT16_VOCABULARY else "uint32",
    )


def _tokenise(
    documents: _Documents,
    options: PrepareOptions,
    rules: PackingRules,
    progress: Progress,
) -> PackedRows:
    """Rows of all documents, in the order of the documents."""
    kind = kind_named(options.kind)
    records = [{"text": text} for text in documents.texts]
    for record, label in zip(records, documents.labels, strict=False):
        record["label"] = label
    starts = range(0, len(records), _DOCUMENTS_A_TASK)
    work = partial(_pack_records, options.tokenizer, options.kind, rules)
    tasks = (records[start : start + _DOCUMENTS_A_TASK] for start in starts)
    workers = options.workers or available_cores()
    parts = []
    packed = ordered_map(work, tasks, workers=min(workers, len(starts)), doing="tokenising")
    for start, part in zip(starts, packed, strict=True):
        part.document += start
        parts.append(part)
        progress("tokenising", min(start + _DOCUMENTS_A_TASK, len(records)), len(records))
    labels = tuple(sorted({label for part in parts for label in part.labels}))
    for part in parts:
        for name in set(kind.label_columns) & set(part.columns):
            numbers = part.columns[name]
            places = np.array([labels.index(label) for label in part.labels], dtype=numbers.dtype)
            numbered = (numbers >= 0) & (numbers < len(places))
            numbers[numbered] = places[numbers[numbered]]
    return PackedRows(
        np.concatenate([part.document for part in parts]),
        np.concatenate([part.ordinal for part in parts]),
        {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns},
        np.concatenate([part.lost for part in parts]),
        labels,
    )


def _pack_records(tokenizer: Path, kind: str, rules: PackingRules, records: list[dict[str, Any]]) -> PackedRows:
    return kind_named(kind).pack(records, _tokenizer_at(tokenizer), rules)


_tokenizer_at = lru_cache(maxsize=1)(load_tokenizer)


def _counts(documents: _Documents, rows: PackedRows, bad: BadRecords) -> dict[str, int]:
    too_short, short_tokens, truncated, cut_tokens = (int(value) for value in rows.lost.sum(axis=0))
    return {
        "documents read": documents.read,
        "bad records": bad.count,
        "duplicate documents": documents.duplicates,
        "rows too short": too_short,
        "tokens in rows too short": short_tokens,
        "ends of texts too long": truncated,
        "tokens in those ends": cut_tokens,
    }


def _write_split(
    options: PrepareOptions,
    rules: PackingRules,
    name: str,
    rows: PackedRows,
    chosen_documents: NDArray[np.bool_],
    hashes: NDArray[np.uint64],
    tokenizer: Tokenizer,
    identity: dict[str, Any],
    report: PrepareReport,
) -> Manifest:
    folder = options.out / name
    chosen = np.flatnonzero(chosen_documents[rows.document])
    if not len(chosen):
        raise DataError(
            f"no row is left for {name}",
            where=", ".join(options.inputs),
            why=f"{len(rows.document)} rows in all; --heldout is {options.heldout_fraction}.",
            do="Give more text, or change --heldout.",
        )
    kind = kind_named(options.kind)
    moved = np.zeros(len(chosen), dtype=np.uint64) if kind.whole_documents else rows.ordinal[chosen].astype(np.uint64)
    keys = keyed_hash(options.seed, _SHUFFLE, hashes[rows.document[chosen]], moved)
    # Ties can only be of one document: its rows stay in order.
    chosen = chosen[np.lexsort((rows.ordinal[chosen], hashes[rows.document[chosen]], keys))]
    spec = kind.columns(rules)
    block_rows, shard_rows = options.block_rows or kind.block_rows, options.shard_rows or kind.shard_rows
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST_NAME).unlink(missing_ok=True)
        shards = [
            write_shard(
                folder,
                number,
                {column: array[chosen[begin : begin + shard_rows]] for column, array in rows.columns.items()},
                spec=spec,
                block_rows=block_rows,
            )
            for number, begin in enumerate(range(0, len(chosen), shard_rows))
        ]
    num_tokens = 0
    for column in spec:
        if column.name in kind.token_columns:
            num_tokens += int(rows.columns[column.lengths][chosen].sum()) if column.lengths else len(chosen)
    manifest = Manifest(
        kind=options.kind,
        columns=spec,
        block_rows=block_rows,
        seq_len=options.seq_len,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        num_rows=len(chosen),
        num_tokens=num_tokens,
        shards=tuple(shards),
        labels=rows.labels,
        facts=kind.facts(tokenizer, rules),
        preparation={"identity": identity, "counts": report.counts},
    )
    manifest.save(folder)
    return manifest


def _facts(manifest: Manifest) -> dict[str, int]:
    widths: Iterator[int] = (column.shape[0] for column in manifest.columns if column.shape)
    slots = sum(widths) * manifest.num_rows
    return {
        "rows": manifest.num_rows,
        "tokens": manifest.num_tokens,
        "shards": len(manifest.shards),
        "slots": slots,
        "padding": slots - manifest.num_tokens,
    }
