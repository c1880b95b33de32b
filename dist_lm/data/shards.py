"""Shards on disk: tar files of blocks of rows, their index, and the check that they are whole.

Enters: arrays of rows to write; a data set folder to read.  Leaves: `s-000000.tar` with its index
`s-000000.tar.idx`; blocks of rows as arrays.  Promises: a shard appears whole or not at all; the
same rows give the same bytes; and a shard that is missing, cut short, exchanged or damaged ends in
an error that names it, because every block's key, members and sizes are compared with the manifest.
webdataset by itself ends a damaged shard without a word.  Shards may come from anybody: nothing is
extracted, unpickled or decompressed, and a block whose tar headers tell of anything but plain files
inside it is refused whole.

webdataset writes the shards and groups their members to samples; in between window.py takes blocks
apart, which has to read every header anyway: tarfile, which would read them once more, in pieces of
10 KiB, took two thirds of the time.

Every block is checked as it is read, by what stands in its headers: the CRC-32 of each member and the
content hash of its shard, which the manifest knows.  A whole shard is compared with its SHA-256 by
`data verify` (verify.py) and when it enters a cache; a run that goes on does not wait for that.

Format.  A tar sample is a block of up to `block_rows` rows: a member for each column, named
`<shard:06d><block:06d>.<column>`, holding the raw little-endian array [rows, *shape]; of a column with
lengths (manifest.py, Column) only the filled places, the rows one after the other.  The index is one
uint64 for each block, the offset of its first tar header, and one for the end of the last.
A member's owner name is the CRC-32 of its content, its group name the content hash of the shard.

This is the only module that imports webdataset, and it never gives it a URL.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.blocks import block_key, columns_of, find_damage, members_of, owner_name
from dist_lm.data.cache import ShardCache
from dist_lm.data.damage import DamagedData, damaged
from dist_lm.data.location import is_remote, join, redact
from dist_lm.data.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    Column,
    Manifest,
    ShardEntry,
    shard_name,
)
from dist_lm.data.storage import open_file
from dist_lm.data.window import REMOTE_READS, Place, Scratch, Window
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
    "write_shard",
]

Block = dict[str, NDArray[Any]]
"""Rows of one block: for each column an array [rows, *shape], to be read and not written."""

_INDEX_DTYPE = np.dtype("<u8")
_MAX_NUMBER = 10**6
"""Shards and blocks are numbered with six digits."""


def load_webdataset() -> Any:
    """The library, imported safely."""
    # Read at import: refuses the URLs that start a shell, should anyone ever pass one.
    os.environ["WDS_SECURE"] = "1"
    import webdataset

    return webdataset


class Opener(Protocol):
    def __call__(self, location: str, *, size: int | None) -> BinaryIO:
        """A seekable file; `size` is its length where that is known already."""


def _open(location: str, *, size: int | None) -> BinaryIO:
    # Windows ask for what they need: reading ahead of them would fetch bytes that nobody wants.
    return open_file(location, size=size, buffer_bytes=0)


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
            content = _content(columns, spec, block_rows)
            offsets = _write_blocks(file, shard_index, columns, spec, block_rows, content)
        with WholeFile(index_path) as index_file:
            index_file.write(np.asarray(offsets, dtype=_INDEX_DTYPE).tobytes())
        sync_folder(folder)
    return ShardEntry(path.name, rows, blocks, file.size, file.sha256, index_file.sha256, content)


def _content(columns: Mapping[str, NDArray[Any]], spec: Sequence[Column], block_rows: int) -> str:
    """The content hash of ShardEntry; it must be known before the first header is written."""
    digest = hashlib.blake2b(digest_size=8)
    for _, members in _blocks(columns, spec, block_rows):
        for name, payload in members.items():
            digest.update(f"{name} {len(payload)} {owner_name(payload)};".encode("ascii"))
    return digest.hexdigest()


def _blocks(
    columns: Mapping[str, NDArray[Any]], spec: Sequence[Column], block_rows: int
) -> Iterator[tuple[int, dict[str, bytes]]]:
    """Number and members of each block."""
    for block, lo in enumerate(range(0, len(columns[spec[0].name]), block_rows)):
        part = {column.name: columns[column.name][lo : lo + block_rows] for column in spec}
        yield block, members_of(part, spec)


def _write_blocks(
    file: WholeFile,
    number: int,
    columns: Mapping[str, NDArray[Any]],
    spec: Sequence[Column],
    block_rows: int,
    content: str,
) -> list[int]:
    """Write all blocks; returns the offset of each and the end of the last."""
    # An integer mtime of 0: a float, the default, costs an extra header for each member.
    writer = load_webdataset().TarWriter(file, encoder=False, mtime=0)
    writer.group = content
    offsets = []
    for block, members in _blocks(columns, spec, block_rows):
        offsets.append(writer.tarstream.offset)
        for name, payload in members.items():
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
    """Reads ranges of blocks of one data set; checks each shard's size and index when it first opens it, and
    each block by its checksums when it reads it.

    With `verify` the first opening also compares the SHA-256 of a whole local shard.
    """

    def __init__(
        self,
        location: str | Path,
        manifest: Manifest,
        *,
        verify: bool = False,
        opener: Opener = _open,
        cache: ShardCache | None = None,
        reuse_memory: bool = False,
    ) -> None:
        """`reuse_memory`: a block's arrays are overwritten once the next block is asked for."""
        self.location = str(location)
        self.manifest = manifest
        self._remote = is_remote(location)
        self._verify = verify
        self._opener = opener
        # What lies on this machine is read where it lies.
        self._cache = cache if self._remote else None
        self._offsets: dict[int, NDArray[np.uint64]] = {}
        self._scratch = Scratch() if reuse_memory else None
        self._names = {column.name for column in manifest.columns}
        self._wds = load_webdataset()

    def blocks(self, shard: int, lo_block: int, hi_block: int, places: Sequence[Place] = ()) -> Iterator[Block]:
        """Blocks [lo_block, hi_block) of a shard (its place in the manifest), one at a time.

        `places`, one a block, may be filled with the contents (the only column) and stand behind the arrays
        that leave; where they do not, nothing is known of what is in them.
        """
        entry = self.manifest.shards[shard]
        path = join(self.location, entry.name)
        block = lo_block
        try:
            cached = self._cached(shard)
            with cached or self._opener(path, size=entry.bytes if shard in self._offsets else None) as file:
                if shard not in self._offsets:
                    self._check_shard(shard, file, hashed=cached is None and not self._remote)
                    self._offsets[shard] = self._read_index(entry)
                offsets = [int(offset) for offset in self._offsets[shard][lo_block : hi_block + 1]]
                remote = self._remote and cached is None
                window = Window(
                    file,
                    path,
                    entry.content,
                    lo_block,
                    offsets,
                    remote=remote,
                    scratch=self._scratch,
                    places=places,
                )
                samples = self._wds.tariterators.group_by_keys(_for_grouping(window, entry.name))
                for block in range(lo_block, hi_block):
                    yield self._checked(path, shard, block, next(samples, None))
        except DamagedData as error:
            raise error.at(shard=shard) from None
        except (DistLMError, MemoryError):
            raise
        except (FileNotFoundError, IsADirectoryError):
            raise damaged(path, block, "The file is missing.", whole_shard=True).at(shard=shard) from None
        except OSError as error:
            where = f"{redact(path)}, block {block}"
            raise EnvironmentFault("cannot read a shard", where=where, why=str(error)) from error
        except Exception as error:
            # webdataset appends objects to the arguments; the first is the message.
            why = str(error.args[0]) if error.args else type(error).__name__
            raise damaged(path, block, why).at(shard=shard) from error

    def _checked(self, path: str, shard: int, block: int, sample: dict[str, Any] | None) -> Block:
        """The arrays of a sample, if it is the block that it should be."""
        entry = self.manifest.shards[shard]
        if sample is None:
            raise damaged(path, block, f"The shard ends before block {block} of {entry.blocks}.")
        key = block_key(entry.number, block)
        if sample["__key__"] != key:
            raise damaged(path, block, f"Expected the key {key}, found {sample['__key__']}.")
        members = {name for name in sample if not name.startswith("__")}
        if members != self._names:
            raise damaged(path, block, f"Found the columns {sorted(members)}.")
        try:
            return columns_of(sample, self.manifest.columns, self.manifest.block_rows_of(shard, block))
        except ValueError as error:
            raise damaged(path, block, str(error)) from None

    def prefetch(self, shard: int, needed_in: float) -> None:
        """Bring a shard into the cache, if that costs nothing that is needed sooner."""
        file = self._cached(shard, needed_in)
        if file is not None:
            file.close()

    def _cached(self, shard: int, needed_in: float | None = None) -> BinaryIO | None:
        """The shard from the cache, compared with its SHA-256 there."""
        if self._cache is None:
            return None
        entry = self.manifest.shards[shard]
        path = join(self.location, entry.name)
        damage = partial(self._damage, shard)
        return self._cache.open(path, size=entry.bytes, sha256=entry.sha256, damage=damage, needed_in=needed_in)

    def _check_shard(self, shard: int, file: BinaryIO, *, hashed: bool) -> None:
        """Compare a file with what the manifest says of its shard."""
        entry = self.manifest.shards[shard]
        if file.seek(0, os.SEEK_END) != entry.bytes:
            raise self._damage(shard, file)
        if self._verify and hashed:
            file.seek(0)
            if hashlib.file_digest(file, "sha256").hexdigest() != entry.sha256:  # type: ignore[arg-type]
                raise self._damage(shard, file)

    def _damage(self, shard: int, file: BinaryIO) -> DataError:
        """What is wrong with a file that has not the size or hash of its shard."""
        entry = self.manifest.shards[shard]
        path = join(self.location, entry.name)
        offsets = self._read_index(entry)
        size = file.seek(0, os.SEEK_END)
        if size != entry.bytes:
            block = min(int(np.searchsorted(offsets[1:], size, side="right")), entry.blocks - 1)
            return damaged(path, block, f"The file has {size} bytes, expected {entry.bytes}.", whole_shard=True)
        damaged_block, why = find_damage(file, [int(offset) for offset in offsets], entry.number)
        return damaged(path, damaged_block, f"The SHA-256 is not that of the manifest.\n{why}")

    def _read_index(self, entry: ShardEntry) -> NDArray[np.uint64]:
        path = join(self.location, entry.index_name)
        for _ in range(REMOTE_READS if self._remote else 1):
            try:
                with self._opener(path, size=None) as file:
                    content = file.read()
            except (FileNotFoundError, IsADirectoryError):
                raise damaged(path, None, "The file is missing.") from None
            if hashlib.sha256(content).hexdigest() == entry.index_sha256:
                break
        else:
            raise damaged(path, None, "The SHA-256 is not that of the manifest.")
        offsets = np.frombuffer(content, _INDEX_DTYPE).astype(np.uint64)
        if len(offsets) != entry.blocks + 1 or np.any(offsets[1:] <= offsets[:-1]) or offsets[-1] > entry.bytes:
            raise damaged(path, None, f"It tells of other blocks than the {entry.blocks} of the manifest.")
        return offsets


def _for_grouping(window: Window, url: str) -> Iterator[dict[str, Any]]:
    """The members of a window as webdataset groups them to samples: an empty one says that a sample is complete."""
    for members in window.blocks():
        for name, content in members:
            yield {"fname": name, "data": content, "__url__": url}
        yield {}
