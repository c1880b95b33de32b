"""Views: the training rows of a data set, whatever it stores.

Enters: a manifest and, for a stream of tokens, the length of a row.  Leaves: columns, rows of each
shard, and ranges of rows read from a ShardReader.  Promises: the rows of a view follow from the
manifest and seq_len alone; the fingerprint covers both.

Most kinds store rows: their view is the identity.  Kind `tokens` stores one endless text for each
shard; row k of a shard is its tokens [k x seq_len, (k + 1) x seq_len), across the ends of documents,
and up to seq_len - 1 tokens at the end of a shard belong to no row.  So the length of a row can be
changed without preparing the data again.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.manifest import Column, Manifest
from dist_lm.data.order import partner_rows
from dist_lm.data.shards import Block, ShardReader
from dist_lm.data.window import Place
from dist_lm.errors import ConfigError, DataError

TOKENS_KIND = "tokens"
TOKENS_COLUMN = "tokens"


class View(ABC):
    """What training, evaluation and inspection see of a data set."""

    manifest: Manifest
    seq_len: int
    """Tokens of a model input, special tokens included."""
    columns: tuple[Column, ...]
    """The columns of a row."""
    shard_rows: tuple[int, ...]
    """Rows of each shard; may be 0."""
    group_rows: int
    """Rows of a shard that are read together; a row's partner is in its group.  The last of a shard may be smaller."""

    @property
    def num_rows(self) -> int:
        return sum(self.shard_rows)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return sum(column.row_bytes for column in self.columns)

    @property
    @abstractmethod
    def tokens_a_row(self) -> float:
        """Tokens of a row that are not padding, on average."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hash over what decides the rows and their storage order."""

    @abstractmethod
    def blocks(self, reader: ShardReader, shard: int, lo: int, hi: int) -> Iterator[Block]:
        """Rows [lo, hi) of a shard, in pieces of whole groups.

        `lo` and `hi` are multiples of group_rows, or the shard's end; lo < hi.
        """

    def read_into(
        self, columns: Mapping[str, NDArray[Any]], at: int, reader: ShardReader, shard: int, lo: int, hi: int
    ) -> None:
        """Put rows [lo, hi) of a shard into `columns`, at the places from `at` on; `lo` and `hi` as in `blocks`."""
        begin = at
        for block in self.blocks(reader, shard, lo, hi):
            rows = len(next(iter(block.values())))
            for name, array in block.items():
                columns[name][at : at + rows] = array
            at += rows
        assert at - begin == hi - lo, (shard, lo, hi)

    def column(self, name: str) -> Column:
        """DataError where there is no such column."""
        return self.manifest.column(name)

    def group_range(self, shard: int, lo: int, hi: int) -> tuple[int, int]:
        """The rows of all groups that rows [lo, hi) of a shard are in."""
        size = self.group_rows
        return lo // size * size, min(-(-hi // size) * size, self.shard_rows[shard])

    def partners(self, shard: int, rows: NDArray[np.int64], *, seed: int, epoch: int, sample_id: Any) -> Any:
        """For rows of a shard, other rows of their groups, chosen by identity."""
        group_start = rows - rows % self.group_rows
        group_rows = np.minimum(self.group_rows, self.shard_rows[shard] - group_start)
        return group_start + partner_rows(rows - group_start, group_rows, seed=seed, epoch=epoch, sample_id=sample_id)


def view_of(manifest: Manifest, seq_len: int | None, *, where: str = "") -> View:
    """The training rows of a data set; `seq_len` is data.seq_len, `where` the data set's location.

    Raises ConfigError where seq_len is missing or does not fit the data set, DataError where no shard
    holds a row.
    """
    if manifest.kind == TOKENS_KIND:
        return TokenView(manifest, seq_len, where)
    return RowView(manifest, seq_len, where)


class RowView(View):
    """The rows that are stored."""

    def __init__(self, manifest: Manifest, seq_len: int | None, where: str) -> None:
        if seq_len is not None and seq_len != manifest.seq_len:
            raise ConfigError(
                f"data.seq_len is {seq_len}, the rows of the data set were packed for {manifest.seq_len} tokens",
                where=where,
                why=f"Rows of kind '{manifest.kind}' are stored as they are; only a stream of tokens can be cut anew.",
                do=f"Leave data.seq_len out, or prepare the data again with --seq-len {seq_len}.",
            )
        self.manifest = manifest
        self.seq_len = manifest.seq_len
        self.columns = manifest.columns
        self.shard_rows = manifest.shard_rows
        self.group_rows = manifest.block_rows

    @property
    def tokens_a_row(self) -> float:
        return self.manifest.num_tokens / max(self.manifest.num_rows, 1)

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def blocks(self, reader: ShardReader, shard: int, lo: int, hi: int) -> Iterator[Block]:
        return reader.blocks(shard, lo // self.group_rows, -(-hi // self.group_rows))


class TokenView(View):
    """Rows of `seq_len` tokens, cut from the endless text of each shard."""

    def __init__(self, manifest: Manifest, seq_len: int | None, where: str) -> None:
        if seq_len is None:
            raise ConfigError(
                "data.seq_len is missing",
                where=where,
                why="The data set is a stream of tokens; a row of it is as long as the configuration says.",
                do="Set data.seq_len to the tokens of a model input, such as 512.",
            )
        if seq_len < 1:
            raise ConfigError(f"data.seq_len is {seq_len}", where=where, do="Set it to 1 or more.")
        stored = manifest.column(TOKENS_COLUMN)
        self.manifest = manifest
        self.seq_len = seq_len
        self.columns = (Column(TOKENS_COLUMN, stored.dtype, (seq_len,)),)
        self.shard_rows = tuple(tokens // seq_len for tokens in manifest.shard_rows)
        self.group_rows = 1
        if manifest.shards and not any(self.shard_rows):
            raise DataError(
                f"no shard has the {seq_len} tokens of a row",
                where=where,
                why=f"The longest has {max(manifest.shard_rows)}.",
                do="Lower data.seq_len, or prepare more data.",
            )

    @property
    def tokens_a_row(self) -> float:
        return float(self.seq_len)

    @property
    def fingerprint(self) -> str:
        facts = {"tokens": self.manifest.fingerprint, "seq_len": self.seq_len}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("ascii")).hexdigest()

    def read_into(
        self, columns: Mapping[str, NDArray[Any]], at: int, reader: ShardReader, shard: int, lo: int, hi: int
    ) -> None:
        # Rows that lie one after the other are the text itself: no row is cut out, none is pieced together.
        rows = columns[TOKENS_COLUMN][at : at + hi - lo].reshape(-1)
        filled = 0
        for tokens in self._pieces(reader, shard, lo, hi, rows):
            place = rows[filled : filled + len(tokens)]
            if not np.may_share_memory(tokens, place):
                place[:] = tokens
            filled += len(tokens)
        assert filled == len(rows), (shard, lo, hi)

    def _pieces(
        self, reader: ShardReader, shard: int, lo: int, hi: int, rows: NDArray[Any] | None = None
    ) -> Iterator[NDArray[Any]]:
        """The tokens of rows [lo, hi) of a shard, block by block; perhaps where they belong in `rows`."""
        block_tokens = self.manifest.block_rows
        at, end = lo * self.seq_len, hi * self.seq_len
        first_block, end_block = at // block_tokens, -(-end // block_tokens)
        places: list[Place] = []
        if rows is not None and self.columns[0].numpy_dtype.isnative:
            memory, size = memoryview(rows.view(np.uint8)), rows.itemsize  # type: ignore[arg-type]
            for begin in range(first_block * block_tokens - at, end - at, block_tokens):
                stop = min(begin + block_tokens, self.manifest.shards[shard].rows - at)
                whole = begin >= 0 and stop <= len(rows)
                places.append(memory[begin * size : stop * size] if whole else None)
        for number, block in enumerate(reader.blocks(shard, first_block, end_block, places), first_block):
            begin = number * block_tokens
            yield block[TOKENS_COLUMN][max(at - begin, 0) : end - begin]

    def blocks(self, reader: ShardReader, shard: int, lo: int, hi: int) -> Iterator[Block]:
        rest = np.empty(0, self.columns[0].numpy_dtype)
        for piece in self._pieces(reader, shard, lo, hi):
            tokens = np.concatenate([rest, piece])
            whole = len(tokens) // self.seq_len * self.seq_len
            rest = tokens[whole:]
            if whole:
                yield {TOKENS_COLUMN: tokens[:whole].reshape(-1, self.seq_len)}
