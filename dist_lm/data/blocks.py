"""The tar members of a block: their names, their checksums, and which of them is damaged.

Enters: a shard file whose hash is wrong, and its index.  Leaves: the first damaged block and what is
wrong with it.  Promises: needs nothing but the tar headers, whose owner names are CRC-32 checksums
of the contents; a shard made of whole blocks is reported as such.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import BinaryIO

Buffer = bytes | memoryview

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


def block_key(shard_number: int, block: int) -> str:
    """The part of member names before the column.  Digits only: webdataset splits names at dots."""
    return f"{shard_number:06d}{block:06d}"


def owner_name(payload: Buffer) -> str:
    """The owner name of a member with this content."""
    return f"crc32:{zlib.crc32(payload):08x}"


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


def find_damage(file: BinaryIO, offsets: Sequence[int], shard_number: int) -> tuple[int | None, str]:
    """The first block that is not what it was when written, and why; None if all are whole."""
    for block, (at, end) in enumerate(pairwise(offsets)):
        while at < end:
            file.seek(at)
            try:
                member = tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "strict")
            except (tarfile.TarError, UnicodeDecodeError) as error:
                return block, f"A tar header is damaged ({error})."
            if member.name.partition(".")[0] != block_key(shard_number, block):
                return block, f"Found the member {member.name}."
            if owner_name(file.read(member.size)) != member.uname:
                return block, f"The content of {member.name} is damaged."
            at += tarfile.BLOCKSIZE * (1 + -(-member.size // tarfile.BLOCKSIZE))
    return None, "Every block is whole: the shard is of another preparation, or its padding is damaged."
