"""Some blocks of a shard, as a file that the tar reader may trust.

Enters: an open shard and the offsets of some of its blocks.  Leaves: the bytes of these blocks.
Promises: not a byte of a block is handed out before its tar headers were found to be those of plain
files of this very shard that fill the block, and their checksums were compared.  Memory: twice
PIECE_BYTES, or twice the largest block.
"""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np

from dist_lm.data.blocks import Buffer, owner_name
from dist_lm.data.damage import damaged
from dist_lm.data.location import redact
from dist_lm.data.remote_file import PIECE_BYTES

log = logging.getLogger(__name__)

REMOTE_READS = 2
"""Times that content is asked for before it is called damaged: a bit may have flipped on the way."""

# Fields of a tar header.
_NAME, _SIZE, _CHECKSUM, _TYPE, _OWNER, _GROUP = (
    slice(0, 100),
    slice(124, 136),
    slice(148, 156),
    slice(156, 157),
    slice(265, 297),
    slice(297, 329),
)
_EMPTY_CHECKSUM = 8 * ord(" ")
"""The checksum of a header counts its own field as blanks."""


class Window:
    """Some blocks of a shard, as a file of their own: the tar reader must not run into the next block.

    It reads whole blocks, as many at once as PIECE_BYTES hold and one at least, and looks at their
    headers before it hands out a byte.
    """

    def __init__(
        self, file: BinaryIO, path: str, content: str, first_block: int, offsets: Sequence[int], *, remote: bool
    ) -> None:
        """`content`: that of the shard (ShardEntry); `offsets`: where each block begins in the file, and
        where the last one ends.

        The blocks of a remote file are read once more before they are called damaged.
        """
        self._file, self._path, self._content = file, path, content
        self._first, self._offsets = first_block, offsets
        self._reads = REMOTE_READS if remote else 1
        self._next = 0
        self._data = io.BytesIO()

    def read(self, size: int) -> bytes:
        data = self._data.read(size)
        if not data and self._next < len(self._offsets) - 1:
            self._load()
            data = self._data.read(size)
        return data

    def _load(self) -> None:
        lo, start = self._next, self._offsets[self._next]
        hi = max(int(np.searchsorted(self._offsets, start + PIECE_BYTES, side="right")) - 1, lo + 1)
        problem: tuple[int, str] | None = None
        for _ in range(self._reads):
            self._file.seek(start)
            content = self._file.read(self._offsets[hi] - start)
            problem = next(self._problems(memoryview(content), lo, hi), None)
            if problem is None:
                self._data, self._next = io.BytesIO(content), hi
                return
            log.info("%s, block %d: %s", redact(self._path), *problem)
        assert problem is not None
        raise damaged(self._path, *problem)

    def _problems(self, content: memoryview, lo: int, hi: int) -> Iterator[tuple[int, str]]:
        """Blocks that cannot be right, and why; the content is that of blocks [lo, hi) of the window."""
        start = self._offsets[lo]
        for place in range(lo, hi):
            begin, end = self._offsets[place] - start, self._offsets[place + 1] - start
            problem = member_problem(content[begin:end], end - begin, self._content)
            if problem:
                yield self._first + place, problem


def member_problem(block: Buffer, expected_bytes: int, shard_content: str) -> str | None:
    """Why these bytes cannot be the tar members of one block of a shard; None if they can.

    Only plain files that lie inside the block are let through: no link, device, extended header, sparse
    or compressed member, and none that is larger than its place, of another shard, or damaged.
    """
    block = memoryview(block)
    if len(block) != expected_bytes:
        return f"The shard ends inside this block: {len(block)} of {expected_bytes} bytes are there."
    at = 0
    while at < len(block):
        header = bytes(block[at : at + tarfile.BLOCKSIZE])
        if _octal(header[_CHECKSUM]) != _EMPTY_CHECKSUM + sum(header) - sum(header[_CHECKSUM]):
            return f"The tar header at byte {at} of the block is damaged."
        if header[_TYPE] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            return f"At byte {at} of the block is a tar member of type {header[_TYPE]!r}, not a plain file."
        size = _octal(header[_SIZE])
        if size is None:
            return f"At byte {at} of the block is a tar member without a size."
        content = at + tarfile.BLOCKSIZE
        at = content + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if at > len(block):
            return f"A tar member of {size} bytes is larger than its block of {len(block)} bytes."
        name = _text(header[_NAME])
        if _text(header[_OWNER]) != owner_name(block[content : content + size]):
            return f"The content of {name} is damaged."
        if _text(header[_GROUP]) != shard_content:
            return f"{name} is of another preparation: {_text(header[_GROUP])}, expected {shard_content}."
    return None


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("latin-1")


def _octal(text: bytes) -> int | None:
    digits = text.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None
