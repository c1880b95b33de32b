"""Files of the user: which there are, and their bytes without compression.

Enters: files, folders, patterns, URLs that fsspec knows.  Leaves: locations, open files.
Promises: .gz and .zst that are cut short or damaged end in a DataError that names the file; the same
inputs are listed in the same order, each file once.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

import pyarrow as pa

from dist_lm.data.location import is_http, is_remote, local_path, name_of, redact
from dist_lm.data.remote_file import RemoteFile, file_system
from dist_lm.data.retry import Retries, persist
from dist_lm.data.storage import open_file
from dist_lm.disk import disk_errors, sha256_of
from dist_lm.errors import DataError, EnvironmentFault

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# What text most often shrinks to; decides nothing but how many parts the work is divided into.
_EXPANSION = 5
_GLOB_SIGNS = "*["
_VERSION_FIELDS = ("size", "ETag", "etag", "md5Hash", "generation", "LastModified", "Last-Modified", "last_modified")
"""What file systems tell about the version of a file."""


@dataclass(frozen=True)
class SourceFile:
    """One input file."""

    location: str
    num_bytes: int
    """As it lies there."""

    @property
    def compression(self) -> str | None:
        return COMPRESSIONS.get(PurePosixPath(name_of(self.location)).suffix.lower())

    @property
    def suffix(self) -> str:
        """The suffix that tells the format, without .gz or .zst; lower case."""
        path = PurePosixPath(name_of(self.location))
        return (path.with_suffix("") if self.compression else path).suffix.lower()

    def absolute(self) -> SourceFile:
        """The same file, for processes in other folders."""
        location = self.location if is_remote(self.location) else os.path.abspath(local_path(self.location))
        return SourceFile(location, self.num_bytes)

    @property
    def text_bytes(self) -> int:
        """About how much there is to read."""
        return self.num_bytes * (_EXPANSION if self.compression else 1)


@contextlib.contextmanager
def reading(location: str) -> Iterator[BinaryIO]:
    """The file, decompressed.  Errors of the disk and of the content name it."""
    with read_errors(location), open_file(location) as plain:
        compression = SourceFile(location, 0).compression
        if compression is None:
            yield plain
        else:
            stream = pa.CompressedInputStream(pa.PythonFile(plain, mode="r"), compression)
            yield cast(BinaryIO, io.BufferedReader(stream))


@contextlib.contextmanager
def reading_seekable(location: str) -> Iterator[BinaryIO]:
    """The same for formats that jump about in a file; a compressed one is unpacked into a temporary file."""
    with reading(location) as file:
        if SourceFile(location, 0).compression is None:
            yield file
        else:
            with tempfile.TemporaryFile() as unpacked:
                shutil.copyfileobj(file, unpacked)
                unpacked.seek(0)
                yield cast(BinaryIO, unpacked)


@contextlib.contextmanager
def read_errors(location: str) -> Iterator[None]:
    """DataError where the content is damaged, EnvironmentFault where the disk is to blame."""
    try:
        yield
    except FileNotFoundError:
        raise _missing(location) from None
    except (pa.ArrowException, OSError) as error:
        # The decompressors and parsers of pyarrow raise OSErrors without an errno.
        if isinstance(error, pa.ArrowException) or error.errno is None:
            raise DataError(
                "an input file is damaged",
                where=redact(location),
                why=str(error).splitlines()[0],
                do="Copy or make the file again.",
            ) from error
        raise EnvironmentFault(
            "cannot read an input", where=redact(location), why=str(error), do="Look at the path and the rights."
        ) from error


def content_key(file: SourceFile) -> str:
    """Changes with the content: a hash of it, or for a remote file what the storage tells about its version."""
    if not is_remote(file.location):
        path = local_path(file.location)
        with disk_errors(path, "read an input"):
            return sha256_of(path)
    fs, key = file_system(file.location, Retries())
    with read_errors(file.location):
        info = persist(lambda: fs.info(key), file.location, Retries(), "read from")
    facts = {name: str(info[name]) for name in _VERSION_FIELDS if name in info}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def list_files(given: str, wanted: Callable[[SourceFile], bool]) -> list[SourceFile]:
    """The files that an input stands for; folders and patterns are searched for those that are `wanted`.

    A file that is named itself is listed in any case.
    """
    if is_remote(given):
        return _list_remote(given, wanted)
    path = os.path.expanduser(local_path(given))
    if os.path.isfile(path):
        return [_local(path)]
    found = [path] if os.path.isdir(path) else sorted(glob.glob(path, recursive=True))
    if not found:
        raise _missing(given)
    files = []
    for match in found:
        inside = sorted(map(str, Path(match).rglob("*"))) if os.path.isdir(match) else [match]
        for name in inside:
            # A folder that is hidden itself may be what the user named.
            hidden = any(part.startswith(".") for part in Path(os.path.relpath(name, match)).parts if part != ".")
            if os.path.isfile(name) and not hidden and wanted(_local(name)):
                files.append(_local(name))
    return files


def _local(path: str) -> SourceFile:
    with disk_errors(Path(path), "read an input"):
        return SourceFile(path, os.stat(path).st_size)


def _list_remote(given: str, wanted: Callable[[SourceFile], bool]) -> list[SourceFile]:
    if is_http(given):
        with read_errors(given):
            return [SourceFile(given, RemoteFile(given).size)]
    fs, key = file_system(given, Retries())
    search = fs.glob if any(sign in key for sign in _GLOB_SIGNS) else fs.find
    with read_errors(given):
        infos = persist(lambda: search(key, detail=True), given, Retries(), "list")
    scheme = given.partition("://")[0]
    found = [
        SourceFile(f"{scheme}://{name.lstrip('/')}", int(info["size"] or 0))
        for name, info in sorted(infos.items())
        if info["type"] == "file"
    ]
    if not found:
        raise _missing(given)
    named_itself = list(infos) == [key]
    return [file for file in found if named_itself or wanted(file)]


def _missing(given: str) -> DataError:
    return DataError(
        "an input does not exist",
        where=redact(given),
        why="No file, no folder, and no pattern that matches any.",
        do="Look at the path; quote patterns so that the shell leaves them alone.",
    )
