"""The rows of evaluation: every row exactly once, spread over the ranks.

Enters: a data set folder, and which rank of how many asks.  Leaves: micro-batches of Rows, in the
order of the data set.  Promises: all ranks together see each row exactly once; every rank yields the
same number of micro-batches of the same size, filled up with rows that are not real; the second pass
equals the first.  Memory: one block (of tokens: and a row) and two micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.cache import ShardCache
from dist_lm.data.location import redact
from dist_lm.data.manifest import Manifest
from dist_lm.data.rows import PARTNER_PREFIX, Rows, concat
from dist_lm.data.shards import Block, ShardReader
from dist_lm.data.views import view_of
from dist_lm.errors import ConfigError, DataError


class HeldoutRows:
    """This rank's micro-batches of a data set; each iteration is one whole pass."""

    def __init__(
        self,
        folder: str | Path,
        *,
        rank: int,
        world_size: int,
        micro_rows: int,
        seq_len: int | None = None,
        limit_rows: int | None = None,
        partner_columns: Sequence[str] = (),
        seed: int = 0,
        cache: ShardCache | None = None,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not one of {world_size} ranks", where="RANK, WORLD_SIZE")
        if micro_rows < 1 or (limit_rows is not None and limit_rows < 1):
            raise ConfigError(f"micro_rows ({micro_rows}) and limit_rows ({limit_rows}) must be positive")
        manifest = Manifest.load(folder)
        self.view = view_of(manifest, seq_len, where=redact(folder))
        if self.view.num_rows == 0:
            why = "There is nothing to evaluate on."
            raise DataError("the held-out data set has no rows", where=redact(folder), why=why)
        self.num_rows = min(self.view.num_rows, limit_rows or self.view.num_rows)
        """Real rows of all ranks together."""
        self._micro_rows = micro_rows
        # A stretch for each rank, equal to within one row: each block is read by one rank, or two.
        self._lo = self.num_rows * rank // world_size
        self._hi = self.num_rows * (rank + 1) // world_size
        most_rows = -(-self.num_rows // world_size)
        self._num_micro = -(-most_rows // micro_rows)
        self._seed = seed
        self._partner_columns = [self.view.column(name).name for name in partner_columns]
        self._shard_start = np.concatenate([[0], np.cumsum(self.view.shard_rows)])
        self._reader = ShardReader(folder, manifest, cache=cache)

    def __len__(self) -> int:
        """Micro-batches that every rank yields."""
        return self._num_micro

    def __iter__(self) -> Iterator[Rows]:
        emitted = 0
        pending: Rows | None = None
        for part in self._stretch(self._lo, self._hi):
            pending = part if pending is None else concat([pending, part])
            while len(pending) > self._micro_rows:
                yield pending.take(slice(self._micro_rows))
                emitted += 1
                pending = pending.take(slice(self._micro_rows, None))
        if pending is None:
            # A rank without rows still goes through the motions, or the others would wait for it.
            pending = next(self._stretch(0, 1)).as_fillers()
        # At least one row is left: the fillers repeat it.
        for _ in range(emitted, self._num_micro):
            pending = pending.padded(self._micro_rows)
            yield pending
            pending = pending.as_fillers()

    def _stretch(self, lo: int, hi: int) -> Iterator[Rows]:
        """Rows [lo, hi) of the data set, piece by piece."""
        for shard, shard_rows in enumerate(self.view.shard_rows):
            start = int(self._shard_start[shard])
            first, end = max(lo - start, 0), min(hi - start, shard_rows)
            if first >= end:
                continue
            begin, end_row = self.view.group_range(shard, first, end)
            for block in self.view.blocks(self._reader, shard, begin, end_row):
                rows = len(next(iter(block.values())))
                wanted = np.arange(max(first, begin), min(end, begin + rows))
                yield self._rows(block, begin, shard, wanted)
                begin += rows

    def _rows(self, block: Block, begin: int, shard: int, wanted: NDArray[np.int64]) -> Rows:
        """The wanted rows of a shard; the block holds its rows from `begin` on."""
        sample_id = (self._shard_start[shard] + wanted).astype(np.uint64)
        columns = {name: array[wanted - begin] for name, array in block.items()}
        if self._partner_columns:
            partner = self.view.partners(shard, wanted, seed=self._seed, epoch=0, sample_id=sample_id) - begin
            for name in self._partner_columns:
                columns[PARTNER_PREFIX + name] = block[name][partner]
        epoch = np.zeros(len(wanted), dtype=np.int64)
        return Rows(columns, sample_id, epoch, np.ones(len(wanted), dtype=np.bool_))
