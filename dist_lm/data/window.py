"""Some blocks of a shard: read in pieces, checked, and taken apart into tar members.

Enters: an open shard and the offsets of some of its blocks.  Leaves: the tar members of these blocks,
as webdataset's grouping takes them.
Promises: not a byte of a block is handed out before its tar headers were found to be those of plain
files of this very shard that fill the block, and their checksums were compared.  Memory: a piece (1 MiB
of a local file, twice PIECE_BYTES of a remote one), or the largest block.
"""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.blocks import owner_name
from dist_lm.data.damage import damaged
from dist_lm.data.location import redact
from dist_lm.data.remote_file import PIECE_BYTES

log = logging.getLogger(__name__)

REMOTE_READS = 2
"""Times that content is asked for before it is called damaged: a bit may have flipped on the way."""

_LOCAL_PIECE_BYTES = 1 << 20
"""Most bytes of a local file that are read at once: they stay in the processor's cache until they are copied."""

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

Member = tuple[str, memoryview]
"""Name and content."""


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
    ) -> None:
        """`content`: that of the shard (ShardEntry); `offsets`: where each block begins in the file, and
        where the last one ends; `scratch`: the members of a piece are overwritten by the next piece.

        The blocks of a remote file are read once more before they are called damaged.
        """
        self._file, self._path, self._content = file, path, content
        self._first, self._offsets = first_block, offsets
        self._reads, self._piece_bytes = (REMOTE_READS, PIECE_BYTES) if remote else (1, _LOCAL_PIECE_BYTES)
        self._scratch = scratch

    def blocks(self) -> Iterator[list[Member]]:
        """The members of one block after the other; a piece of whole blocks is read at once."""
        lo, last = 0, len(self._offsets) - 1
        while lo < last:
            limit = self._offsets[lo] + self._piece_bytes
            hi = max(int(np.searchsorted(self._offsets, limit, side="right")) - 1, lo + 1)
            yield from self._checked(lo, hi)
            lo = hi

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


def block_members(block: memoryview, expected_bytes: int, shard_content: str) -> list[Member]:
    """The tar members of one block of a shard; ValueError with the reason where these bytes cannot be that.

    Only plain files that lie inside the block are let through: no link, device, extended header, sparse
    or compressed member, and none that is larger than its place, of another shard, or damaged.
    """
    if len(block) != expected_bytes:
        raise ValueError(f"The shard ends inside this block: {len(block)} of {expected_bytes} bytes are there.")
    members = []
    at = 0
    while at < len(block):
        header = bytes(block[at : at + tarfile.BLOCKSIZE])
        if _octal(header[_CHECKSUM]) != _EMPTY_CHECKSUM + sum(header) - sum(header[_CHECKSUM]):
            raise ValueError(f"The tar header at byte {at} of the block is damaged.")
        if header[_TYPE] not in (tarfile.REGTYPE, tarfile.AREGTYPE):
            raise ValueError(f"At byte {at} of the block is a tar member of type {header[_TYPE]!r}, not a plain file.")
        size = _octal(header[_SIZE])
        if size is None:
            raise ValueError(f"At byte {at} of the block is a tar member without a size.")
        begin = at + tarfile.BLOCKSIZE
        at = begin + -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if at > len(block):
            raise ValueError(f"A tar member of {size} bytes is larger than its block of {len(block)} bytes.")
        name, content = _text(header[_NAME]), block[begin : begin + size]
        if _text(header[_OWNER]) != owner_name(content):
            raise ValueError(f"The content of {name} is damaged.")
        if _text(header[_GROUP]) != shard_content:
            raise ValueError(f"{name} is of another preparation: {_text(header[_GROUP])}, expected {shard_content}.")
        members.append((name, content))
    return members


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("latin-1")


def _octal(text: bytes) -> int | None:
    digits = text.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None
