"""Files wherever they lie: on this machine, behind http, in object storage.

Enters: a location (see location.py).  Leaves: seekable files, bytes, lists of locations.
Promises: a remote file is read by ranges, and a connection that breaks, stalls or ends too early
goes on at the byte where it stopped; what a server answers is checked against what it was asked for
and against the length it told; a file is written whole or not at all.  A file that is missing is a
FileNotFoundError, a location that nobody should open a ConfigError, and storage that does not answer
an EnvironmentFault; none of them shows a secret of the URL.
"""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import BinaryIO, cast

from dist_lm import disk
from dist_lm.data.location import EXTRAS, is_http, is_remote, join, local_path, redact
from dist_lm.data.remote_file import PIECE_BYTES, RemoteFile, file_system
from dist_lm.data.retry import Retries, persist
from dist_lm.errors import ConfigError

__all__ = [
    "PIECE_BYTES",
    "Retries",
    "exists",
    "is_remote",
    "join",
    "list_files",
    "open_file",
    "read_bytes",
    "redact",
    "write_bytes",
]

_GLOB = re.compile(r"[*\[]")


def open_file(
    location: str | Path, *, size: int | None = None, buffer_bytes: int = PIECE_BYTES, retries: Retries | None = None
) -> BinaryIO:
    """A seekable file for reading.

    `size` is the length of a remote file if it is known; it spares a request.  With `buffer_bytes=0`
    every `read(n)` of a remote file is one request for those n bytes (two, beyond PIECE_BYTES).  A
    missing remote file is noticed by the first read.
    """
    if not is_remote(location):
        return open(local_path(location), "rb")
    raw = RemoteFile(str(location), size=size, retries=retries)
    return io.BufferedReader(raw, buffer_bytes) if buffer_bytes else cast(BinaryIO, raw)


def read_bytes(location: str | Path, *, retries: Retries | None = None) -> bytes:
    """The whole content."""
    with open_file(location, buffer_bytes=0, retries=retries) as file:
        return file.read()


def write_bytes(location: str | Path, content: bytes, *, retries: Retries | None = None) -> None:
    """The content under this name, whole or not at all; folders above it are made."""
    if not is_remote(location):
        path = local_path(location)
        with disk.disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_bytes(path, content)
        return
    if is_http(str(location)):
        where = redact(location)
        raise ConfigError("nothing can be written to a web server", where=where, do="Name a folder, or s3://...")
    fs, key = file_system(str(location), retries or Retries())

    def write() -> None:
        fs.pipe_file(key, content)
        written = fs.info(key)["size"]
        if written != len(content):
            raise OSError(f"the storage has {written} bytes of {len(content)} that were written")

    persist(write, str(location), retries or Retries(), "write to")


def exists(location: str | Path, *, retries: Retries | None = None) -> bool:
    """Whether there is such a file (or local folder)."""
    if not is_remote(location):
        return local_path(location).exists()
    try:
        return RemoteFile(str(location), retries=retries).size >= 0
    except FileNotFoundError:
        return False


def list_files(location: str | Path, *, retries: Retries | None = None) -> list[str]:
    """The locations of the files that a pattern matches, or that lie in a folder; or the file itself.  Sorted."""
    if not is_remote(location):
        path = local_path(location)
        if path.is_dir():
            return sorted(str(file) for file in path.rglob("*") if file.is_file())
        if path.exists() or not _GLOB.search(str(path)):
            return [str(path)]
        root = Path(path.anchor)
        return sorted(str(file) for file in root.glob(str(path.relative_to(root))) if file.is_file())
    url = str(location)
    if is_http(url):
        if _GLOB.search(url):
            do = "Name each file, or take object storage (s3://, gs://, az://)."
            raise ConfigError("a web server lists no files", where=redact(url), do=do)
        return [url]
    fs, key = file_system(url, retries or Retries())
    scheme = url.partition("://")[0]
    found = persist(lambda: fs.glob(key) if _GLOB.search(key) else fs.find(key), url, retries or Retries(), "list")
    return sorted(f"{scheme}://{name.lstrip('/')}" if scheme in EXTRAS else fs.unstrip_protocol(name) for name in found)
