"""Files and folders that are there in full or not at all.

Enters: bytes and a path.  Leaves: a file, or a folder of files, on stable storage; size and hash.
Promises: a reader never sees half of it; a killed writer leaves at most `<name>.tmp`, which the
next one overwrites; a full disk is an EnvironmentFault that leaves the old file in place.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dist_lm.errors import EnvironmentFault

_CHUNK_BYTES = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


@contextlib.contextmanager
def disk_errors(path: Path, doing: str = "") -> Iterator[None]:
    """Turn any OSError raised inside into an EnvironmentFault that names `path` and the remedy.

    `doing` completes the sentence "cannot ..."; without it, "write <path>".
    """
    try:
        yield
    except OSError as error:
        raise EnvironmentFault(
            f"cannot {doing or f'write {path}'}", where=str(path), why=str(error), do=_remedy(error, path)
        ) from error


def _remedy(error: OSError, path: Path) -> str:
    if error.errno in _FULL:
        folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
        free_mb = shutil.disk_usage(folder).free / 1e6
        return f"Free space ({free_mb:.0f} MB are free there), or choose a folder on another disk; then run again."
    if error.errno in _FORBIDDEN:
        return "Choose a folder that you may write to, or change its rights."
    if error.errno == errno.EFBIG:
        return "Raise the limit on the size of a file (ulimit -f), or choose another file system."
    return "Look at the path and the disk, then run the same command again."


class WholeFile:
    """A file being written: renamed to its name when the `with` block ends without an error.

    `durable`: synced before that, so that it survives a power cut.  `hashed`: tells its SHA-256.
    """

    def __init__(self, path: Path, *, durable: bool = True, hashed: bool = True) -> None:
        self.size = 0
        self.sha256 = ""
        """Of the content; known once the file is published."""
        self._path, self._durable, self._hashed = path, durable, hashed
        self._temporary = path.with_name(path.name + ".tmp")
        self._hash = hashlib.sha256()
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed in __exit__

    def write(self, data: bytes | memoryview) -> int:
        if self._hashed:
            self._hash.update(data)
        self.size += len(data)
        return self._file.write(data)

    def __enter__(self) -> WholeFile:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            with self._file:
                if error_type is None and self._durable:
                    self._file.flush()
                    os.fsync(self._file.fileno())
            if error_type is None:
                os.replace(self._temporary, self._path)
                self.sha256 = self._hash.hexdigest() if self._hashed else ""
        finally:
            # Gone already after the rename; what a failed writer began must not fill the disk.
            self._temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: Path, reached: Callable[[str], object] = lambda point: None) -> Iterator[Path]:
    """A hidden folder to be filled, which gets its name when the `with` block ends without an error.

    `path` may be an empty folder.  `reached`: faults.py's places, for tests.
    """
    hidden = path.with_name(f".tmp-{path.name}")
    with disk_errors(path):
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)
        try:
            yield hidden
            for file in hidden.iterdir():
                with file.open("rb") as content:
                    os.fsync(content.fileno())
            sync_folder(hidden)
            reached("before_rename")
            if path.exists():
                path.rmdir()
            hidden.rename(path)
            sync_folder(path.parent)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise


def write_bytes(path: Path, content: bytes) -> None:
    """The content under this name, whole, and there after a power cut."""
    with disk_errors(path):
        with WholeFile(path) as file:
            file.write(content)
        sync_folder(path.parent)


def write_json(path: Path, content: Any) -> None:
    """`content` as indented JSON, keys sorted."""
    write_bytes(path, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
