"""Shards on disk: tar files of blocks of rows, their index, and the check that they are whole.

Enters: arrays of rows to write; a data set folder to read.  Leaves: `s-000000.tar` with its index
`s-000000.tar.idx`; blocks of rows as arrays.  Promises: a shard appears whole or not at all; the
same rows give the same bytes; and a shard that is missing, cut short, exchanged or damaged ends in
an error that names it, because every block's key, members and sizes are compared with the manifest.
webdataset by itself ends a damaged shard without a word.

Format.  A tar sample is a block of up to `block_rows` rows: a member for each column, named
`<shard:06d><block:06d>.<column>`, holding the raw little-endian array [rows, *shape]; of a column with
lengths (manifest.py, Column) only the filled places, the rows one after the other.  The index is one
uint64 for each block, the offset of its first tar header, and one for the end of the last.
A member's owner name is the CRC-32 of its content; it lets a failed check name the block.

This is the only module that imports webdataset, and it never gives it a URL.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.blocks import block_key, columns_of, find_damage, members_of, owner_name
from dist_lm.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Column,
    Manifest,
    ShardEntry,
    shard_name,
)
from dist_lm.disk import WholeFile, disk_errors, sync_folder
from dist_lm.errors import DataError, DistLMError, EnvironmentFault

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "Block",
    "Column",
    "Manifest",
    "ShardEntry",
    "ShardReader",
    "shard_name",
    "verify_dataset",
    "write_shard",
]

Block = dict[str, NDArray[Any]]
"""Rows of one block: for each column an array [rows, *shape], to be read and not written."""
Opener = Callable[[Path], BinaryIO]

_INDEX_DTYPE = np.dtype("<u8")
_MAX_NUMBER = 10**6
"""Shards and blocks are numbered with six digits."""


def _webdataset() -> Any:
    # Read at import: refuses the URLs that start a shell, should anyone ever pass one.
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    return webdataset


def _open_local(path: Path) -> BinaryIO:
    return open(path, "rb")


# ---------------------------------------------------------------------------------- writing


def write_shard(
    folder: Path,
    shard_index: int,
    columns: Mapping[str, NDArray[Any]],
    *,
    spec: Sequence[Column],
    block_rows: int,
) -> ShardEntry:
    """Write one shard and its index into an existing folder; each appears whole or not at all.

    `columns` maps each name of `spec` to an array [rows, *shape] of its dtype, rows >= 1.  A killed
    writer leaves at most `<name>.tmp`, which the next call overwrites.  Two processes must not write
    the same shard at once.
    """
    path = folder / shard_name(shard_index)
    rows = _check_columns(path, columns, spec)
    blocks = -(-rows // block_rows)
    if shard_index >= _MAX_NUMBER or blocks > _MAX_NUMBER:
        raise DataError(
            f"shard {shard_index} with {blocks} blocks cannot be numbered with six digits",
            where=str(path),
            do="Take larger shards, or larger blocks.",
        )
    index_path = path.with_name(path.name + ".idx")
    with disk_errors(path):
        with WholeFile(path) as file:
            offsets = _write_blocks(file, shard_index, columns, spec, block_rows)
        with WholeFile(index_path) as index_file:
            index_file.write(np.asarray(offsets, dtype=_INDEX_DTYPE).tobytes())
        sync_folder(folder)
    return ShardEntry(path.name, rows, blocks, file.size, file.sha256, index_file.sha256)


def _write_blocks(
    file: WholeFile, number: int, columns: Mapping[str, NDArray[Any]], spec: Sequence[Column], block_rows: int
) -> list[int]:
    """Write all blocks; returns the offset of each and the end of the last."""
    # An integer mtime of 0: a float, the default, costs an extra header for each member.
    writer = _webdataset().TarWriter(file, encoder=False, mtime=0)
    rows = len(columns[spec[0].name])
    offsets = []
    for block, lo in enumerate(range(0, rows, block_rows)):
        offsets.append(writer.tarstream.offset)
        part = {column.name: columns[column.name][lo : lo + block_rows] for column in spec}
        for name, payload in members_of(part, spec).items():
            writer.user = owner_name(payload)
            writer.write({"__key__": block_key(number, block), name: payload})
    offsets.append(writer.tarstream.offset)
    writer.close()
    return offsets


def _check_columns(path: Path, columns: Mapping[str, NDArray[Any]], spec: Sequence[Column]) -> int:
    """The number of rows, if the arrays are those of the spec."""
    problems = []
    if sorted(columns) != sorted(column.name for column in spec):
        problems.append(f"got columns {sorted(columns)}, the spec has {[column.name for column in spec]}")
    else:
        rows = len(columns[spec[0].name])
        for column in spec:
            array = columns[column.name]
            if array.dtype.newbyteorder("=") != column.numpy_dtype.newbyteorder("="):
                problems.append(f"{column.name}: dtype {array.dtype}, not {column.dtype}")
            if array.shape != (rows, *column.shape):
                problems.append(f"{column.name}: shape {array.shape}, not {(rows, *column.shape)}")
        if not problems and rows == 0:
            problems.append("there are no rows")
        for column in spec if not problems else ():
            longest = int(columns[column.lengths].max()) if column.lengths else 0
            if column.lengths and (longest > column.shape[0] or int(columns[column.lengths].min()) < 0):
                problems.append(f"{column.lengths}: a length is outside [0, {column.shape[0]}]")
    if problems:
        raise DataError("these arrays cannot be written as a shard", where=str(path), why="\n".join(problems))
    return rows


# ---------------------------------------------------------------------------------- reading


class ShardReader:
    """Reads ranges of blocks of one data set; checks each shard's size and index when it first opens it.

    With `verify` the first opening also hashes the whole shard, once for each reader.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, verify: bool = True, opener: Opener = _open_local) -> None:
        self.folder = folder
        self.manifest = manifest
        self._verify = verify
        self._opener = opener
        self._offsets: dict[int, NDArray[np.uint64]] = {}
        self._wds = _webdataset()

    def blocks(self, shard: int, lo_block: int, hi_block: int) -> Iterator[Block]:
        """Blocks [lo_block, hi_block) of a shard (its place in the manifest), one at a time."""
        path = self.folder / self.manifest.shards[shard].name
        block = lo_block
        try:
            with self._opener(path) as file:
                if shard not in self._offsets:
                    self._offsets[shard] = self._check_shard(shard, path, file)
                start, end = (int(offset) for offset in self._offsets[shard][[lo_block, hi_block]])
                file.seek(start)
                # A list among the arguments is taken apart into stages: hence a list in the list.
                pipeline = self._wds.DataPipeline(
                    [[{"url": path.name, "stream": _Window(file, end - start)}]],
                    lambda sources: self._wds.tariterators.tar_file_expander(sources),
                    lambda members: self._wds.tariterators.group_by_keys(members),
                )
                samples = iter(pipeline)
                for block in range(lo_block, hi_block):
                    yield self._checked(shard, block, next(samples, None))
        except (DistLMError, MemoryError):
            raise
        except (FileNotFoundError, IsADirectoryError):
            raise _damaged(path, block, "The file is missing.") from None
        except OSError as error:
            where = f"{path}, block {block}"
            raise EnvironmentFault("cannot read a shard", where=where, why=str(error)) from error
        except Exception as error:
            # webdataset appends objects to the arguments; the first is the message.
            why = str(error.args[0]) if error.args else type(error).__name__
            raise _damaged(path, block, why) from error

    def _checked(self, shard: int, block: int, sample: dict[str, Any] | None) -> Block:
        """The arrays of a sample, if it is the block that it should be."""
        entry = self.manifest.shards[shard]
        path = self.folder / entry.name
        if sample is None:
            raise _damaged(path, block, f"The shard ends before block {block} of {entry.blocks}.")
        key = block_key(entry.number, block)
        if sample["__key__"] != key:
            raise _damaged(path, block, f"Expected the key {key}, found {sample['__key__']}.")
        members = {name for name in sample if not name.startswith("__")}
        if members != {column.name for column in self.manifest.columns}:
            raise _damaged(path, block, f"Found the columns {sorted(members)}.")
        try:
            return columns_of(sample, self.manifest.columns, self.manifest.block_rows_of(shard, block))
        except ValueError as error:
            raise _damaged(path, block, str(error)) from None

    def _check_shard(self, shard: int, path: Path, file: BinaryIO) -> NDArray[np.uint64]:
        """The offsets of the blocks, once the shard and its index are what the manifest says."""
        entry = self.manifest.shards[shard]
        offsets = self._read_index(entry)
        size = file.seek(0, os.SEEK_END)
        if size != entry.bytes:
            block = min(int(np.searchsorted(offsets[1:], size, side="right")), entry.blocks - 1)
            raise _damaged(path, block, f"The file has {size} bytes, expected {entry.bytes}.")
        if self._verify:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
            if digest != entry.sha256:
                damaged_block, why = find_damage(file, [int(offset) for offset in offsets], entry.number)
                raise _damaged(path, damaged_block, f"The SHA-256 is not that of the manifest.\n{why}")
        return offsets

    def _read_index(self, entry: ShardEntry) -> NDArray[np.uint64]:
        path = self.folder / entry.index_name
        try:
            with self._opener(path) as file:
                content = file.read()
        except (FileNotFoundError, IsADirectoryError):
            raise _damaged(path, None, "The file is missing.") from None
        if hashlib.sha256(content).hexdigest() != entry.index_sha256:
            raise _damaged(path, None, "The SHA-256 is not that of the manifest.")
        return np.frombuffer(content, _INDEX_DTYPE).astype(np.uint64)


def verify_dataset(folder: Path) -> Manifest:
    """Read every byte of a data set; a DataError names the first shard and block that is wrong."""
    manifest = Manifest.load(folder)
    reader = ShardReader(folder, manifest)
    for shard, entry in enumerate(manifest.shards):
        for _ in reader.blocks(shard, 0, entry.blocks):
            pass
    return manifest


class _Window:
    """The next bytes of a file, as a file of its own: the tar reader must not run into the next block."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._left = num_bytes

    def read(self, size: int) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def _damaged(path: Path, block: int | None, why: str) -> DataError:
    return DataError(
        "a shard is missing or damaged",
        where=str(path) if block is None else f"{path}, block {block}",
        why=why,
        do="Copy the data set again, or prepare it again; `dist-lm data verify` checks all shards.",
    )
