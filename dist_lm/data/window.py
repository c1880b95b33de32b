"""Some blocks of a shard, as a file that the tar reader may trust.

Enters: an open shard and the offsets of some of its blocks.  Leaves: the bytes of these blocks.
Promises: not a byte of a block is handed out before its tar headers were found to be those of plain
files that fill the block; with `check_content`, before their checksums were compared.  Memory: twice
PIECE_BYTES, or twice the largest block.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np

from dist_lm.data.blocks import Buffer, owner_name
from dist_lm.data.location import redact
from dist_lm.data.remote_file import PIECE_BYTES
from dist_lm.errors import DataError

# Fields of a tar header.
_NAME, _SIZE, _CHECKSUM, _TYPE, _OWNER = (
    slice(0, 100),
    slice(124, 136),
    slice(148, 156),
    slice(156, 157),
    slice(265, 297),
)
_EMPTY_CHECKSUM = 8 * ord(" ")
"""The checksum of a header counts its own field as blanks."""


class Window:
    """Some blocks of a shard, as a file of their own: the tar reader must not run into the next block.

    It reads whole blocks, as many at once as PIECE_BYTES hold and one at least, and looks at their
    headers before it hands out a byte.
    """

    def __init__(
        self, file: BinaryIO, path: str, first_block: int, offsets: Sequence[int], *, check_content: bool
    ) -> None:
        """`offsets`: where each block begins in the file, and where the last one ends."""
        self._file, self._path, self._check_content = file, path, check_content
        self._first, self._offsets = first_block, offsets
        self._next = 0
        self._data = io.BytesIO()
        file.seek(offsets[0])

    def read(self, size: int) -> bytes:
        data = self._data.read(size)
        if not data and self._next < len(self._offsets) - 1:
            self._load()
            data = self._data.read(size)
        return data

    def _load(self) -> None:
        lo, start = self._next, self._offsets[self._next]
        hi = max(int(np.searchsorted(self._offsets, start + PIECE_BYTES, side="right")) - 1, lo + 1)
        content = self._file.read(self._offsets[hi] - start)
        view = memoryview(content)
        for place in range(lo, hi):
            block = view[self._offsets[place] - start : self._offsets[place + 1] - start]
            problem = member_problem(
                block, self._offsets[place + 1] - self._offsets[place], check_content=self._check_content
            )
            if problem:
                raise damaged(self._path, self._first + place, problem)
        self._data, self._next = io.BytesIO(content), hi


def member_problem(block: Buffer, expected_bytes: int, *, check_content: bool) -> str | None:
    """Why these bytes cannot be the tar members of one block; None if they can.

    Only plain files that lie inside the block are let through: no link, device, extended header, sparse
    or compressed member, and none that is larger than its place.  With `check_content` the checksum of
    each is compared too.
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
        if check_content:
            owner = header[_OWNER].rstrip(b"\0").decode("latin-1")
            if owner != owner_name(block[content : content + size]):
                name = header[_NAME].rstrip(b"\0").decode("latin-1")
                return f"The content of {name} is damaged."
    return None


def _octal(text: bytes) -> int | None:
    digits = text.strip(b" \0")
    return int(digits, 8) if digits.isdigit() and not set(digits) & set(b"89") else None


def damaged(path: str, block: int | None, why: str) -> DataError:
    return DataError(
        "a shard is missing or damaged",
        where=redact(path) if block is None else f"{redact(path)}, block {block}",
        why=why,
        do="Copy the data set again, or prepare it again; `dist-lm data verify` checks all shards.",
    )
