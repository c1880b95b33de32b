"""A reader for training that goes on without damaged blocks.

Enters: a data set and the places of it that are in quarantine.  Leaves: blocks of the size that the
manifest tells, those in quarantine with the rows of others.
Promises: the answer follows from the manifest and the quarantine.  A block that stands for another is
checked as any block is, so that in the end the next whole one does, whoever found what and when.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dist_lm.data.cache import ShardCache
from dist_lm.data.damage import WHOLE_SHARD
from dist_lm.data.location import redact
from dist_lm.data.manifest import Manifest
from dist_lm.data.shards import Block, ShardReader
from dist_lm.data.window import Place
from dist_lm.errors import DataError


class SubstitutingReader(ShardReader):
    """Answers blocks in quarantine by the next that are not."""

    def __init__(
        self,
        location: str | Path,
        manifest: Manifest,
        quarantine: Collection[tuple[int, int]],
        *,
        cache: ShardCache | None = None,
        reuse_memory: bool = False,
    ) -> None:
        """`quarantine`: shard (its place in the manifest) and block, or WHOLE_SHARD."""
        super().__init__(location, manifest, cache=cache, reuse_memory=reuse_memory)
        self._quarantine = frozenset(quarantine)
        self._hurt = {shard for shard, _ in quarantine}

    def blocks(self, shard: int, lo_block: int, hi_block: int, places: Sequence[Place] = ()) -> Iterator[Block]:
        if shard not in self._hurt:
            yield from super().blocks(shard, lo_block, hi_block, places)
            return
        whole_from = lo_block
        for block in range(lo_block, hi_block):
            if self._is_out(shard, block):
                if whole_from < block:
                    yield from super().blocks(shard, whole_from, block)
                yield self._substitute(shard, block)
                whole_from = block + 1
        if whole_from < hi_block:
            yield from super().blocks(shard, whole_from, hi_block)

    def _is_out(self, shard: int, block: int) -> bool:
        return not self._quarantine.isdisjoint({(shard, block), (shard, WHOLE_SHARD)})

    def _substitute(self, shard: int, block: int) -> Block:
        """The rows of another block, repeated or cut to the number that is wanted."""
        other_shard, other_block = self._next_whole(shard, block)
        (found,) = super().blocks(other_shard, other_block, other_block + 1)
        length = self.manifest.block_rows_of(other_shard, other_block)
        rows = np.arange(self.manifest.block_rows_of(shard, block)) % length
        return {name: array[rows] for name, array in found.items()}

    def _next_whole(self, shard: int, block: int) -> tuple[int, int]:
        """Of the same shard if it has one, else of the next shards, from the block of the same number on."""
        shards = self.manifest.shards
        for other in (*range(shard, len(shards)), *range(shard)):
            num_blocks = shards[other].blocks
            for step in range(num_blocks):
                place = other, (block + step) % num_blocks
                if not self._is_out(*place):
                    return place
        raise DataError(
            "every block of a data set is damaged",
            where=redact(self.location),
            do="Copy the data set again, or prepare it again.",
        )

    def _cached(self, shard: int, needed_in: float | None = None) -> BinaryIO | None:
        # The cache takes whole shards only: what is left of this one is read where it lies.
        return None if shard in self._hurt else super()._cached(shard, needed_in)
