"""The same rows in other shards.

Enters: a data set, local or remote, and the wanted number or size of shards.  Leaves: a data set in a
local folder.
Promises: the same rows in the same order, compared by hash after writing; a stream of tokens is cut
behind a document where there is one; run again, it does nothing.  Memory: two shards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.location import redact
from dist_lm.data.manifest import MANIFEST_NAME, Manifest
from dist_lm.data.process_pool import Progress, silent
from dist_lm.data.shards import Block, ShardReader, write_shard
from dist_lm.data.verify import verify_dataset
from dist_lm.disk import disk_errors
from dist_lm.errors import ConfigError, DataError

_RECORD = "reshard"


@dataclass(frozen=True)
class ReshardOptions:
    """What to make of what; exactly one of `shard_rows` and `num_shards`."""

    source: str
    """Folder or URL."""
    out: Path
    shard_rows: int | None = None
    """About the rows of each shard but the last (tokens, for a stream of tokens)."""
    num_shards: int | None = None
    """Shards of about the same number of rows."""
    block_rows: int | None = None
    """None: as before."""


def reshard(options: ReshardOptions, progress: Progress = silent) -> Manifest:
    """Raises ConfigError where OUT holds something else, DataError where the source is damaged."""
    source = Manifest.load(options.source)
    _check(options, source)
    block_rows = options.block_rows or source.block_rows
    record = {
        "from": source.fingerprint,
        "shard_rows": options.shard_rows,
        "num_shards": options.num_shards,
        "block_rows": block_rows,
    }
    if (options.out / MANIFEST_NAME).exists():
        return _made_before(options.out, record)
    written = _Writer(options.out, source, block_rows, _cuts(source, options))
    before = _Hashes()
    for shard, block in _blocks(options.source, source):
        before.add(block)
        written.add(block)
        progress("resharding", shard, len(source.shards))
    entries = written.close()
    made = replace(
        source,
        block_rows=block_rows,
        shards=tuple(entries),
        preparation={**source.preparation, _RECORD: record},
    )
    after = _Hashes()
    for _, block in _blocks(str(options.out), made):
        after.add(block)
    # Our own mistake, if it ever happens: then there is no manifest, hence no data set.
    assert after.digests() == before.digests(), "the rows are not those of the source"
    made.save(options.out)
    return made


def _check(options: ReshardOptions, source: Manifest) -> None:
    if (options.shard_rows is None) == (options.num_shards is None):
        raise ConfigError("give either --shard-rows or --shards")
    for flag, number in (
        ("--shard-rows", options.shard_rows),
        ("--shards", options.num_shards),
        ("--block-rows", options.block_rows),
    ):
        if number is not None and number < 1:
            raise ConfigError(f"{number} is too small", where=flag, do="Write a positive number.")
    if options.num_shards is not None and options.num_shards > source.num_rows:
        raise ConfigError(
            f"{source.num_rows} rows cannot fill {options.num_shards} shards",
            where=redact(options.source),
            do=f"Write --shards {source.num_rows} or less.",
        )
    if options.out.exists() and options.out.resolve() == Path(options.source).resolve():
        raise ConfigError("a data set cannot be replaced by itself", where=str(options.out), do="Choose another --out.")


def _made_before(out: Path, record: Mapping[str, Any]) -> Manifest:
    manifest = Manifest.load(out)
    if manifest.preparation.get(_RECORD) != record:
        raise ConfigError(
            "the folder holds another data set", where=str(out), do="Choose another --out, or remove this folder."
        )
    try:
        return verify_dataset(out)
    except DataError as error:
        error.do = f"Remove {out} and run the same command again."
        raise


def _blocks(location: str, manifest: Manifest) -> Iterator[tuple[int, Block]]:
    """All blocks, each with the number of its shard."""
    reader = ShardReader(location, manifest)
    for shard, entry in enumerate(manifest.shards):
        for block in reader.blocks(shard, 0, entry.blocks):
            yield shard, block


def _cuts(manifest: Manifest, options: ReshardOptions) -> list[int]:
    """Rows at which the new shards begin and end."""
    rows = manifest.num_rows
    if options.num_shards is not None:
        return [number * rows // options.num_shards for number in range(options.num_shards + 1)]
    assert options.shard_rows is not None
    return [*range(0, rows, options.shard_rows), rows]


class _Hashes:
    """Hashes of the columns, whatever the blocks."""

    def __init__(self) -> None:
        self._columns: dict[str, Any] = {}

    def add(self, block: Block) -> None:
        for name, array in block.items():
            self._columns.setdefault(name, hashlib.sha256()).update(np.ascontiguousarray(array).data)

    def digests(self) -> dict[str, str]:
        return {name: digest.hexdigest() for name, digest in self._columns.items()}


class _Writer:
    """Collects rows and writes a shard whenever one is full."""

    def __init__(self, out: Path, source: Manifest, block_rows: int, cuts: list[int]) -> None:
        self._out = out
        self._source = source
        self._block_rows = block_rows
        self._ends = [end for start, end in pairwise(cuts)]
        self._separator = source.facts.get("separator_id")
        self._entries: list[Any] = []
        self._written = 0
        self._held: list[Block] = []
        self._held_rows = 0
        with disk_errors(out):
            out.mkdir(parents=True, exist_ok=True)

    def add(self, block: Block) -> None:
        self._held.append(block)
        self._held_rows += len(next(iter(block.values())))
        while self._ends and self._written + self._held_rows >= self._ends[0]:
            self._write(self._ends.pop(0))

    def close(self) -> list[Any]:
        """Entries of the shards; nothing is held any more."""
        assert not self._held_rows, self._held_rows
        return self._entries

    def _write(self, end: int) -> None:
        rows = {name: np.concatenate([block[name] for block in self._held]) for name in self._held[0]}
        count = end - self._written
        if self._ends and self._separator is not None:
            count = _behind_a_document(rows["tokens"], count, self._separator)
        if count:
            part = {name: array[:count] for name, array in rows.items()}
            number = len(self._entries)
            spec, block_rows = self._source.columns, self._block_rows
            self._entries.append(write_shard(self._out, number, part, spec=spec, block_rows=block_rows))
        self._written += count
        self._held = [{name: array[count:] for name, array in rows.items()}]
        self._held_rows -= count


def _behind_a_document(tokens: NDArray[Any], count: int, separator: int) -> int:
    """At most `count` tokens, up to the end of a document; `count` where none ends there."""
    ends = np.flatnonzero(tokens[:count] == separator)
    return int(ends[-1]) + 1 if len(ends) else count
