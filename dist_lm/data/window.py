"""Some blocks of a shard: read in pieces, checked, and taken apart into tar members.

Enters: an open shard, the offsets of some of its blocks, and perhaps places in memory for their
contents.  Leaves: the tar members of these blocks, as webdataset's grouping takes them.
Promises: not a byte of a block is handed out before its tar headers were found to be those of plain
files of this very shard that fill the block, and their checksums were compared.  Memory: a piece (1 MiB
of a local file, twice PIECE_BYTES of a remote one), or the largest block.

A content that has a place is read straight to it, which spares a copy.  That takes a block of one member,
as long as the place; where anything else is found, the blocks are read and judged again as all others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.blocks import HEADER_BYTES, Member, block_members, filled_bytes, placed_member
from dist_lm.data.damage import damaged
from dist_lm.data.location import redact
from dist_lm.data.remote_file import PIECE_BYTES

log = logging.getLogger(__name__)

REMOTE_READS = 2
"""Times that content is asked for before it is called damaged: a bit may have flipped on the way."""

_LOCAL_PIECE_BYTES = 1 << 20
"""Most bytes of a local file that are read at once: they stay in the processor's cache until they are copied."""

_MOST_PLACES = 256
"""Contents that one system call puts to their places at most: it takes 1024 buffers."""

Place = memoryview | None
"""Memory for the content of a block, as long as that; None: it may lie anywhere."""


class Scratch:
    """Memory that one piece after the other is read into."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    def take(self, size: int) -> NDArray[np.uint8]:
        """[size]; what was handed out before is overwritten."""
        if len(self._memory) < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory[:size]


class Window:
    """Some blocks of a shard, and nothing else of it."""

    def __init__(
        self,
        file: BinaryIO,
        path: str,
        content: str,
        first_block: int,
        offsets: Sequence[int],
        *,
        remote: bool,
        scratch: Scratch | None = None,
        places: Sequence[Place] = (),
    ) -> None:
        """`content`: that of the shard (ShardEntry); `offsets`: where each block begins in the file, and
        where the last one ends; `scratch`: the members of a piece are overwritten by the next piece;
        `places`: one a block, or none; those of a remote file are left alone.

        The blocks of a remote file are read once more before they are called damaged.
        """
        self._file, self._path, self._content = file, path, content
        self._first, self._offsets = first_block, offsets
        self._reads, self._piece_bytes = (REMOTE_READS, PIECE_BYTES) if remote else (1, _LOCAL_PIECE_BYTES)
        self._scratch = scratch
        self._places: list[Place] = [None] * (len(offsets) - 1)
        for block, place in enumerate(places if not remote else ()):
            if place is not None and offsets[block + 1] - offsets[block] == HEADER_BYTES + filled_bytes(len(place)):
                self._places[block] = place

    def blocks(self) -> Iterator[list[Member]]:
        """The members of one block after the other; a piece of whole blocks is read at once."""
        lo, last = 0, len(self._offsets) - 1
        while lo < last:
            limit = self._offsets[lo] + self._piece_bytes
            hi = max(int(np.searchsorted(self._offsets, limit, side="right")) - 1, lo + 1)
            # A piece is of blocks that have places, or of such that have none.
            places = [place for place in takewhile(lambda place: place is not None, self._places[lo:hi]) if place]
            if places:
                hi = lo + min(len(places), _MOST_PLACES)
                yield from self._placed(lo, places[: hi - lo]) or self._checked(lo, hi)
            else:
                hi = next((block for block in range(lo, hi) if self._places[block] is not None), hi)
                yield from self._checked(lo, hi)
            lo = hi

    def _placed(self, lo: int, places: Sequence[memoryview]) -> list[list[Member]]:
        """The members of the blocks from `lo` on, read to these places; empty where they are not as expected."""
        start, end = self._offsets[lo], self._offsets[lo + len(places)]
        rooms = memoryview(bytearray(2 * HEADER_BYTES * len(places)))
        headers, buffers = [], []
        for number, place in enumerate(places):
            at = 2 * HEADER_BYTES * number
            headers.append(rooms[at : at + HEADER_BYTES])
            padding = filled_bytes(len(place)) - len(place)
            buffers += [headers[-1], place]
            if padding:
                buffers.append(rooms[at + HEADER_BYTES : at + HEADER_BYTES + padding])
        if os.preadv(self._file.fileno(), buffers, start) != end - start:
            return []
        try:
            return [[placed_member(bytes(x), y, self._content)] for x, y in zip(headers, places, strict=True)]
        except ValueError:
            return []

    def _checked(self, lo: int, hi: int) -> list[list[Member]]:
        """The members of each of blocks [lo, hi) of the window."""
        for reads_left in reversed(range(self._reads)):
            content = self._read(self._offsets[lo], self._offsets[hi])
            found: list[list[Member]] = []
            block = lo
            try:
                for block in range(lo, hi):
                    begin, end = (offset - self._offsets[lo] for offset in self._offsets[block : block + 2])
                    found.append(block_members(content[begin:end], end - begin, self._content))
            except ValueError as error:
                if not reads_left:
                    raise damaged(self._path, self._first + block, str(error)) from None
                log.info("%s, block %d: %s", redact(self._path), self._first + block, error)
            else:
                return found
        raise AssertionError("unreachable")

    def _read(self, start: int, end: int) -> memoryview:
        """Bytes [start, end) of the file, or up to its end."""
        size = end - start
        memory = np.empty(size, np.uint8) if self._scratch is None else self._scratch.take(size)
        content = memoryview(memory)  # type: ignore[arg-type]
        self._file.seek(start)
        got = self._file.readinto(content)  # type: ignore[attr-defined]
        return content[:got]
