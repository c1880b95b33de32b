"""Small preparations of real text, and what they should give."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np

from dist_lm.data.kinds.registry import kind_named
from dist_lm.data.preparation.plan import resolve_rules
from dist_lm.data.prepare import PrepareOptions
from dist_lm.data.shards import Manifest, ShardReader
from dist_lm.data.tokenizer import Tokenizer

_PARTS = [part for name in sorted(topics) for part in topics[name].split("\n\n\n") if len(part) > 60]
TEXTS = list(dict.fromkeys(_PARTS))
SMALL: dict[str, Any] = {"workers": 1, "split_bytes": 60_000, "part_bytes": 30_000, "bucket_bytes": 120_000}
"""Several splits, parts and buckets from little text."""


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def options(source: Path, tokenizer: Tokenizer, out: Path, **settings: Any) -> PrepareOptions:
    wanted = {**SMALL, "seq_len": 48, "heldout_fraction": 0.1, "shard_rows": 400, "block_rows": 32, **settings}
    return PrepareOptions(inputs=[str(source)], out=out, tokenizer=tokenizer.path, **wanted)


def files_of(folder: Path) -> dict[str, str]:
    """Name and hash of every file below a folder, but for the lock."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".prepare.lock"
    }


def columns_of(folder: Path) -> dict[str, np.ndarray]:
    """All rows of a data set, in the order of its shards."""
    manifest = Manifest.load(folder)
    reader = ShardReader(folder, manifest)
    blocks = [block for shard, entry in enumerate(manifest.shards) for block in reader.blocks(shard, 0, entry.blocks)]
    return {column.name: np.concatenate([block[column.name] for block in blocks]) for column in manifest.columns}


def rows_of(columns: dict[str, np.ndarray], spec: Any) -> list[tuple[Any, ...]]:
    """The rows as tuples that can be compared and sorted, without padding."""
    lists = {column.name: columns[column.name].tolist() for column in spec}
    for column in spec:
        if column.lengths:
            lists[column.name] = [
                tuple(row[:length]) for row, length in zip(lists[column.name], lists[column.lengths], strict=True)
            ]
    return list(zip(*(lists[column.name] for column in spec), strict=True))


def expected_rows(records: list[dict[str, Any]], made_by: PrepareOptions, tokenizer: Tokenizer) -> list[Any]:
    """What the kind packs of these records, all at once."""
    kind, rules = kind_named(made_by.kind), resolve_rules(made_by, tokenizer)
    packed = kind.pack([kind.clean(record, rules) for record in records], tokenizer, rules)
    return rows_of(packed.columns, kind.columns(rules))
