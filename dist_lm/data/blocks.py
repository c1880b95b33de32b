"""The tar members of a block: their names, contents and checksums, and which of them is damaged.

Enters: columns of rows; the members of a block; a shard whose hash is wrong, and its index.
Leaves: members; columns; the first damaged block and what is wrong with it.
Promises: a member holds what is not padding, and nothing else; a member of another size than its
column and the lengths of its rows say is refused, and so is a block whose tar headers tell of anything but
whole plain files of their shard.  Finding damage needs nothing but these headers, whose owner names are
CRC-32 checksums of the contents.
"""

from __future__ import annotations

import struct
import tarfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from dist_lm.data.manifest import Column

Buffer = bytes | memoryview
Member = tuple[str, memoryview]
"""Name and content."""

HEADER_BYTES = tarfile.BLOCKSIZE

_HEADER = struct.Struct("100s 24x 12s 12x 8s 1s 108x 32s 32s 183x")
"""Name, size, checksum, type, owner name and group name."""
_EMPTY_CHECKSUM = 8 * ord(" ")
"""The checksum of a header counts its own field as blanks."""


def block_key(shard_number: int, block: int) -> str:
    """The part of member names before the column.  Digits only: webdataset splits names at dots."""
    return f"{shard_number:06d}{block:06d}"


def owner_name(payload: Buffer) -> str:
    """The owner name of a member with this content."""
    return f"crc32:{isal_zlib.crc32(payload):08x}"


def members_of(columns: Mapping[str, NDArray[Any]], spec: Sequence[Column]) -> dict[str, bytes]:
    """The contents of a block's members, by column: little-endian, without the padding of columns with lengths."""
    members = {}
    for column in sorted(spec, key=lambda column: column.name):
        array = columns[column.name]
        if column.lengths:
            array = array[np.arange(column.shape[0]) < columns[column.lengths][:, None]]
        members[column.name] = np.ascontiguousarray(array, dtype=column.numpy_dtype).tobytes()
    return members


def columns_of(members: Mapping[str, Buffer], spec: Sequence[Column], rows: int) -> dict[str, NDArray[Any]]:
    """The columns [rows, *shape] of a block; places behind a row's length are 0.

    Raises ValueError with the reason where the members cannot be those of so many rows.
    """
    columns: dict[str, NDArray[Any]] = {}
    # Lengths first: they tell the size of other members.
    for column in sorted(spec, key=lambda column: bool(column.lengths)):
        payload = members[column.name]
        filled = rows * column.row_places
        lengths = columns[column.lengths].astype(np.int64) if column.lengths else None
        if lengths is not None:
            if int(lengths.min()) < 0 or int(lengths.max()) > column.shape[0]:
                raise ValueError(f"{column.lengths}: a length is outside [0, {column.shape[0]}].")
            filled = int(lengths.sum())
        if len(payload) != filled * column.numpy_dtype.itemsize:
            expected = f"{filled * column.numpy_dtype.itemsize} ({rows} rows)"
            raise ValueError(f"{column.name}: {len(payload)} bytes, expected {expected}.")
        flat = np.frombuffer(payload, column.numpy_dtype)
        if lengths is None or filled == rows * column.shape[0]:
            columns[column.name] = flat.reshape(rows, *column.shape)
        else:
            columns[column.name] = padded = np.zeros((rows, *column.shape), column.numpy_dtype)
            padded[np.arange(column.shape[0]) < lengths[:, None]] = flat
    return columns


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


class _Header(NamedTuple):
    name: str
    size: int
    owner: str
    group: str


def filled_bytes(size: int) -> int:
    """What a content of this size takes in a tar file, behind its header."""
    return -(-size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


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
        header = _read_header(bytes(block[at : at + HEADER_BYTES]), at)
        begin = at + HEADER_BYTES
        at = begin + filled_bytes(header.size)
        if at > len(block):
            raise ValueError(f"A tar member of {header.size} bytes is larger than its block of {len(block)} bytes.")
        members.append(_whole_member(header, block[begin : begin + header.size], shard_content))
    return members


def placed_member(header: bytes, content: memoryview, shard_content: str) -> Member:
    """The only member of a block, apart from its header; ValueError where it cannot be that."""
    found = _read_header(header, 0)
    if found.size != len(content):
        raise ValueError(f"A tar member has {found.size} bytes, expected {len(content)}.")
    return _whole_member(found, content, shard_content)


def _read_header(header: bytes, at: int) -> _Header:
    if len(header) < HEADER_BYTES:
        raise ValueError(f"The tar header at byte {at} of the block is damaged.")
    name, octal_size, checksum, kind, owner, group = _HEADER.unpack(header)
    if _octal(checksum) != _EMPTY_CHECKSUM + sum(header) - sum(checksum):
        raise ValueError(f"The tar header at byte {at} of the block is damaged.")
    if kind not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise ValueError(f"At byte {at} of the block is a tar member of type {kind!r}, not a plain file.")
    size = _octal(octal_size)
    if size is None:
        raise ValueError(f"At byte {at} of the block is a tar member without a size.")
    return _Header(_text(name), size, _text(owner), _text(group))


def _whole_member(header: _Header, content: memoryview, shard_content: str) -> Member:
    if header.owner != owner_name(content):
        raise ValueError(f"The content of {header.name} is damaged.")
    if header.group != shard_content:
        raise ValueError(f"{header.name} is of another preparation: {header.group}, expected {shard_content}.")
    return header.name, content


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode("latin-1")


def _octal(text: bytes) -> int | None:
    digits = text.strip(b" \0")
    return int(digits, 8) if digits and not digits.translate(None, b"01234567") else None
