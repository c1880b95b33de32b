"""Rows of records, packed as preparation packs them: in memory, or as a small data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dist_lm.data.kinds.base import PackedRows, PackingRules
from dist_lm.data.kinds.registry import kind_named
from dist_lm.data.manifest import Manifest
from dist_lm.data.rows import Rows
from dist_lm.data.shards import write_shard
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View, view_of


def rules_of(seq_len: int, **options: Any) -> PackingRules:
    return PackingRules(seq_len=seq_len, min_tokens=1, token_dtype="uint16", options=options)


def packed(kind_name: str, records: Sequence[dict[str, Any]], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
    kind = kind_named(kind_name)
    kind.check_rules(rules)
    part = kind.pack([kind.clean(record, rules) for record in records], tokenizer, rules)
    part.columns = kind.join(part.columns)
    return part


def num_rows(part: PackedRows) -> int:
    return len(next(iter(part.columns.values())))


def view_and_rows(
    kind_name: str, records: Sequence[dict[str, Any]], tokenizer: Tokenizer, *, seq_len: int, **options: Any
) -> tuple[View, Rows]:
    """What a task sees of a data set made of these records."""
    rules = rules_of(seq_len, **options)
    kind = kind_named(kind_name)
    part = packed(kind_name, records, tokenizer, rules)
    for column in kind.columns(rules):
        array = part.columns[column.name]
        assert (array.dtype, array.shape[1:]) == (column.numpy_dtype, column.shape), column.name
    manifest = Manifest(
        kind=kind_name,
        columns=kind.columns(rules),
        block_rows=256,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        num_rows=num_rows(part),
        num_tokens=0,
        shards=(),
        labels=part.labels,
        facts=kind.facts(tokenizer, rules),
    )
    count = num_rows(part)
    rows = Rows(
        part.columns, np.arange(count, dtype=np.uint64), np.zeros(count, dtype=np.int64), np.ones(count, dtype=np.bool_)
    )
    return view_of(manifest, None), rows


def write_dataset(
    folder: Path,
    kind_name: str,
    records: Sequence[dict[str, Any]],
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    **options: Any,
) -> Path:
    """A data set of one shard with the rows of these records."""
    kind, rules = kind_named(kind_name), rules_of(seq_len, **options)
    part = packed(kind_name, records, tokenizer, rules)
    folder.mkdir(parents=True)
    spec = kind.columns(rules)
    manifest = Manifest(
        kind=kind_name,
        columns=spec,
        block_rows=16,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        num_rows=num_rows(part),
        num_tokens=0,
        shards=(write_shard(folder, 0, part.columns, spec=spec, block_rows=16),),
        labels=part.labels,
        facts=kind.facts(tokenizer, rules),
    )
    manifest.save(folder)
    return folder
