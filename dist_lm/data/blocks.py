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


def block_key(shard_number: int, block: int) -> str:
    """The part of member names before the column.  Digits only: webdataset splits names at dots."""
    return f"{shard_number:06d}{block:06d}"


def owner_name(payload: bytes) -> str:
    """The owner name of a member with this content."""
    return f"crc32:{zlib.crc32(payload):08x}"


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
