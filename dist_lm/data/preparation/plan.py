"""From the user's options to a job: which files, which splits, how many buckets.

Enters: PrepareOptions.  Leaves: the identity of the result, and the Job.
Promises: refuses options that cannot be before anything is written; the identity changes with all
that changes the result, and with nothing else.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from dist_lm.data.kinds.base import PackingRules
from dist_lm.data.kinds.registry import kind_named
from dist_lm.data.preparation.filters import check_filters
from dist_lm.data.preparation.job import Job
from dist_lm.data.preparation.runners import run_tasks
from dist_lm.data.process_pool import Progress, available_cores
from dist_lm.data.sources.files import SourceFile, content_key
from dist_lm.data.sources.format import ReadSettings
from dist_lm.data.sources.inputs import format_of
from dist_lm.data.sources.registry import check_settings
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError, DataError

VERSION = 2
"""Changes whenever the same inputs and options would give other bytes."""
_LARGEST_UINT16_VOCABULARY = 65536
_SPLITS, _SMALLEST_SPLIT, _LARGEST_SPLIT = 32, 1 << 20, 32 << 20
_SMALLEST_ROW, _LARGEST_ROW = 16, 65535


@dataclass(frozen=True)
class PrepareOptions:
    """What to make, and of what."""

    inputs: list[str]
    """Files, folders, patterns, URLs."""
    out: Path
    tokenizer: Path
    kind: str = "pairs"
    seq_len: int = 128
    """Tokens of a model input, special tokens included."""
    heldout_fraction: float = 0.02
    """Share of the documents, chosen by their content, that goes to OUT/heldout."""
    settings: ReadSettings = field(default_factory=ReadSettings)
    kind_options: Mapping[str, Any] = field(default_factory=dict)
    filters: Mapping[str, float] = field(default_factory=dict)
    min_tokens: int | None = None
    """Rows with fewer are dropped."""
    block_rows: int | None = None
    shard_rows: int | None = None
    """Most rows of a shard.  These three: None for what the kind takes."""
    max_bad: int = 0
    """Records that may be unusable."""
    seed: int = 0
    bucket_bytes: int = 64 << 20
    """About how much text goes through one reduce task."""
    workers: int | None = None
    """Processes; None: one a core.  Not part of the result, as are the next three."""
    ray: bool = False
    """Tasks on the Ray cluster instead of processes."""
    split_bytes: int | None = None
    """About how much of a file one map task reads; None: 1 to 32 MiB, less where there is little."""
    part_bytes: int = 64 << 20
    """What a map task holds before it writes."""

    @property
    def num_workers(self) -> int:
        return self.workers or available_cores()


_NOT_PART_OF_THE_RESULT = (
    *("inputs", "out", "tokenizer", "kind_options", "max_bad"),
    *("workers", "ray", "split_bytes", "part_bytes"),
)


def check_options(options: PrepareOptions) -> None:
    """ConfigError for what no data can satisfy."""
    kind_named(options.kind)
    check_filters(options.filters)
    check_settings(options.settings)
    if not 0.0 <= options.heldout_fraction < 1.0:
        raise ConfigError(
            f"a share of {options.heldout_fraction} cannot be held out", where="--heldout", do="Write 0.02."
        )
    if not _SMALLEST_ROW <= options.seq_len <= _LARGEST_ROW:
        raise ConfigError(
            f"rows of {options.seq_len} tokens are impossible",
            where="--seq-len",
            do=f"Write a number from {_SMALLEST_ROW} to {_LARGEST_ROW}.",
        )
    for flag, number in (("--block-rows", options.block_rows), ("--shard-rows", options.shard_rows)):
        if number is not None and number < 1:
            raise ConfigError(f"{number} rows are too few", where=flag, do="Write a positive number.")
    # A Path has swallowed one of the slashes.
    if re.match(r"[a-z0-9+]{2,}:/", str(options.out)):
        raise ConfigError(
            "data sets are written to folders, not to URLs",
            where=str(options.out),
            do="Prepare into a folder, then copy it to the storage.",
        )


def resolve_settings(options: PrepareOptions) -> ReadSettings:
    """The settings, and which fields of the source the kind will look at."""
    kind = kind_named(options.kind)
    theirs = options.settings.fields
    wanted, optional = (
        tuple(theirs.get(name, name) for name in names) for names in (kind.fields, kind.optional_fields)
    )
    return replace(options.settings, wanted=wanted, optional=optional)


def resolve_rules(options: PrepareOptions, tokenizer: Tokenizer) -> PackingRules:
    """ConfigError where the kind does not know an option."""
    kind = kind_named(options.kind)
    # Whoever says where an optional field stands wants it used.
    named = {name: True for name in kind.optional_fields if name in options.settings.fields and name in kind.options}
    rules = PackingRules(
        seq_len=options.seq_len,
        min_tokens=kind.min_tokens if options.min_tokens is None else options.min_tokens,
        token_dtype="uint16" if tokenizer.vocab_size <= _LARGEST_UINT16_VOCABULARY else "uint32",
        options={**named, **options.kind_options},
    )
    kind.check_rules(rules)
    return rules


def identity_of(
    options: PrepareOptions, tokenizer: Tokenizer, files: list[SourceFile], progress: Progress
) -> dict[str, Any]:
    """What decides the result; JSON values."""
    digest = hashlib.sha256()
    keys = run_tasks(content_key, files, workers=min(options.num_workers, len(files)), ray=options.ray, doing="hashing")
    for number, (file, key) in enumerate(zip(files, keys, strict=True), 1):
        digest.update(f"{format_of(file, options.settings).name} {key}\n".encode())
        progress("hashing", number, len(files))
    rules = resolve_rules(options, tokenizer)
    plain = {name: value for name, value in asdict(options).items() if name not in _NOT_PART_OF_THE_RESULT}
    identity = {
        **plain,
        "version": VERSION,
        "kind_options": dict(rules.options),
        "min_tokens": rules.min_tokens,
        "block_rows": options.block_rows or kind_named(options.kind).block_rows,
        "shard_rows": options.shard_rows or kind_named(options.kind).shard_rows,
        "tokenizer_sha256": tokenizer.sha256,
        "facts": kind_named(options.kind).facts(tokenizer, rules),
        "input_files": len(files),
        "inputs_sha256": digest.hexdigest(),
    }
    # As a manifest gives it back: lists for tuples.
    return cast(dict[str, Any], json.loads(json.dumps(identity)))


def plan_job(options: PrepareOptions, tokenizer: Tokenizer, files: list[SourceFile]) -> Job:
    """The job, if there is anything to read."""
    kind = kind_named(options.kind)
    settings = resolve_settings(options)
    splits, text_bytes = [], 0
    few = sum(file.num_bytes for file in files) // _SPLITS
    split_bytes = options.split_bytes or min(max(few, _SMALLEST_SPLIT), _LARGEST_SPLIT)
    for file in files:
        source = format_of(file, settings)
        text_bytes += source.text_bytes(file)
        if file.num_bytes:
            splits += source.splits(file, split_bytes, settings)
    if not splits:
        raise DataError(
            "the input files are empty",
            where=", ".join(options.inputs),
            why=f"{len(files)} files, 0 bytes.",
            do="Name files that hold text.",
        )
    train = max(1, -(-text_bytes // options.bucket_bytes))
    heldout = max(1, round(train * options.heldout_fraction)) if options.heldout_fraction else 0
    return Job(
        kind_name=options.kind,
        rules=resolve_rules(options, tokenizer),
        settings=settings,
        filters=dict(options.filters),
        seed=options.seed,
        heldout_fraction=options.heldout_fraction,
        num_buckets=(train, heldout),
        block_rows=options.block_rows or kind.block_rows,
        shard_rows=options.shard_rows or kind.shard_rows,
        max_bad=options.max_bad,
        part_bytes=options.part_bytes,
        splits=tuple(splits),
    )
