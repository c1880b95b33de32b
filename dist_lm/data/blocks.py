"""The tar members of a block: their names, contents and checksums, and which of them is damaged.

Enters: columns of rows; the members of a block; a shard whose hash is wrong, and its index.
Leaves: members; columns; the first damaged block and what is wrong with it.
Promises: a member holds what is not padding, and nothing else; a member of another size than its
column and the lengths of its rows say is refused.  Finding damage needs nothing but the tar headers,
whose owner names are CRC-32 checksums of the contents.
"""

from __future__ import annotations

import tarfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, BinaryIO

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from dist_lm.data.manifest import Column

Buffer = bytes | memoryview


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
