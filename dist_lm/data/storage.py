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
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from dist_lm import disk
from dist_lm.data.location import (
    EXTRAS,
    fsspec_url,
    is_http,
    is_remote,
    join,
    local_path,
    redact,
    scheme_of,
    scrub,
)
from dist_lm.data.retry import Failures, Retries, persist
from dist_lm.errors import ConfigError, EnvironmentFault

__all__ = ["PIECE_BYTES", "Retries", "exists", "is_remote", "join", "list_files", "open_file", "read_bytes", "redact"]
__all__ += ["write_bytes"]

PIECE_BYTES = 4 << 20
"""Most bytes that one request asks for."""
_CHUNK_BYTES = 1 << 16
_REQUEST_S = 300.0
"""How long one request may take, however steadily its bytes drip."""
_GLOB = re.compile(r"[*\[]")
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")

log = logging.getLogger(__name__)


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
    fs, key = _filesystem(str(location), retries or Retries())

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
    fs, key = _filesystem(url, retries or Retries())
    scheme = url.partition("://")[0]
    found = persist(lambda: fs.glob(key) if _GLOB.search(key) else fs.find(key), url, retries or Retries(), "list")
    return sorted(f"{scheme}://{name.lstrip('/')}" if scheme in EXTRAS else fs.unstrip_protocol(name) for name in found)


@dataclass(frozen=True)
class _Piece:
    """What one request brought."""

    data: bytes
    total: int | None
    """Length of the whole file, if the server told."""
    whole: bool = False
    """The data is the whole file, as the server knows no ranges."""


class RemoteFile(io.RawIOBase):
    """A remote file, read by ranges.  Not for two threads at once."""

    def __init__(self, location: str, *, size: int | None = None, retries: Retries | None = None) -> None:
        super().__init__()
        self.name = redact(location)
        self._location = location
        self._retries = retries or Retries()
        self._fs, self._path = _filesystem(location, self._retries)
        self._size = size
        self._at = 0
        self._whole: bytes | None = None

    @property
    def size(self) -> int:
        """Length in bytes, asked for once."""
        if self._size is None:
            self._size = persist(self._ask_size, self._location, self._retries, "read from")
        return self._size

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at}.get(whence)
        self._at = max((self.size if base is None else base) + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read(max(self.size - self._at, 0))

    def read(self, size: int | None = -1) -> bytes:
        """All bytes asked for, but for the end of the file."""
        if size is None or size < 0:
            return self.readall()
        parts = []
        end = min(self._at + size, self.size)
        while self._at < end:
            part = self._fetch(self._at, min(end, self._at + PIECE_BYTES))
            parts.append(part)
            self._at += len(part)
        return b"".join(parts)

    def _fetch(self, start: int, end: int) -> bytes:
        """Bytes [start, end), however often the connection breaks."""
        got = bytearray()
        failures = Failures(self._location, self._retries, "read from")
        while start + len(got) < end:
            try:
                data = self._request(start + len(got), end)
            except Exception as error:
                failure = error
            else:
                if data:
                    got += data
                    failures.progress()
                    continue
                failure = OSError(f"it ends at byte {start + len(got)}, but told a length of {self.size}")
            failures.wait(failure)
        return bytes(got)

    def _request(self, start: int, end: int) -> bytes:
        """One try for [start, end): a part of it from its start on, at least."""
        if self._whole is not None:
            return self._whole[start:end]
        if not is_http(self._location):
            data = cast(bytes, self._fs.cat_file(self._path, start=start, end=end))
            if len(data) > end - start:
                raise OSError(f"asked for {end - start} bytes, got {len(data)}")
            return data
        piece = self._http(start, end)
        if self._size is not None and piece.total not in (None, self._size):
            raise OSError(f"the length was {self._size} and is now {piece.total}")
        if not piece.whole:
            return piece.data
        if len(piece.data) > end - start:
            _warn_of_whole_files(urlsplit(self.name).netloc)
        self._whole = piece.data
        return self._whole[start:end]

    def _ask_size(self) -> int:
        if not is_http(self._location):
            info = self._fs.info(self._path)
            if info.get("type") == "directory":
                raise IsADirectoryError(self.name)
            return int(info["size"])
        total = self._http(0, 1, body=False).total
        if total is None:
            self._whole = self._http(0, 1).data
            total = len(self._whole)
        return total

    def _http(self, start: int, end: int, *, body: bool = True) -> _Piece:
        from fsspec.asyn import sync

        return cast(_Piece, sync(self._fs.loop, _http_range, self._fs, self._path, start, end, body))


async def _http_range(fs: Any, url: str, start: int, end: int, body: bool) -> _Piece:
    """One GET for bytes [start, end).  What came before a broken connection counts."""
    session = await fs.set_session()
    headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    async with session.get(fs.encode_url(url), headers=headers) as reply:
        told = _CONTENT_RANGE.match(reply.headers.get("Content-Range", ""))
        total = int(told[2]) if told and told[2] != "*" else None
        if reply.status == 416:
            return _Piece(b"", total)
        reply.raise_for_status()
        if reply.headers.get("Content-Encoding", "identity") != "identity":
            raise ValueError("the server sends the file in a compressed form, whose length says nothing")
        ranged = reply.status == 206
        if not ranged:
            total = reply.content_length
        elif told and told[1] and int(told[1]) != start:
            raise OSError(f"asked for bytes from {start}, got bytes from {told[1]}")
        if not body:
            return _Piece(b"", total)
        got = bytearray()
        try:
            async for chunk in reply.content.iter_chunked(_CHUNK_BYTES):
                got += chunk
                if ranged and len(got) > end - start:
                    raise ValueError(f"asked for {end - start} bytes, got more")
        except (TimeoutError, OSError, _payload_error()):
            if not ranged or not got:
                raise
            log.info("%s: the connection broke after %d bytes; going on there", redact(url), len(got))
        return _Piece(bytes(got), total if ranged else len(got), whole=not ranged)


@lru_cache
def _warn_of_whole_files(host: str) -> None:
    log.warning("%s sends whole files only, no ranges; each file is held in memory while it is read", host)


def _payload_error() -> type[Exception]:
    import aiohttp

    return aiohttp.ClientError


def _filesystem(location: str, retries: Retries) -> tuple[Any, str]:
    """The fsspec file system of a location, and its path there."""
    from fsspec.core import url_to_fs

    scheme = scheme_of(location)
    # Listings are never cached: another process may have written meanwhile.
    options: dict[str, Any] = {"use_listings_cache": False}
    if is_http(location):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=_REQUEST_S, sock_connect=retries.stall_s, sock_read=retries.stall_s)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    why, do = "", "Install what fsspec needs for it."
    try:
        fs, path = url_to_fs(fsspec_url(location), **options)
        return fs, str(path)
    except ImportError as error:
        why = scrub(str(error), location)
        if EXTRAS.get(scheme):
            do = f"pip install 'dist-lm[{EXTRAS[scheme]}]'"
    except ValueError as error:
        raise ConfigError("fsspec cannot open this", where=redact(location), why=scrub(str(error), location)) from None
    raise EnvironmentFault(f"the library for {scheme}:// is not installed", where=redact(location), why=why, do=do)
