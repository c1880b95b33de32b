"""A remote file, read by ranges: the part of the storage that talks to a network.

Enters: a URL that location.py found good.  Leaves: a seekable raw file, or the fsspec file system.
Promises: a connection that breaks, stalls or ends too early goes on at the byte where it stopped; a
range that is not the one asked for, or a length other than the one told before, is an error and
never data.  Memory: one piece, or the whole file where a web server knows no ranges.
"""

from __future__ import annotations

import io
import logging
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast
from urllib.parse import urlsplit

from dist_lm.data.location import EXTRAS, fsspec_url, is_http, redact, scheme_of, scrub
from dist_lm.data.retry import Failures, Retries, persist
from dist_lm.errors import ConfigError, EnvironmentFault

PIECE_BYTES = 4 << 20
"""Most bytes that one request asks for."""
_CHUNK_BYTES = 1 << 16
_REQUEST_S = 300.0
"""How long one request may take, however steadily its bytes drip."""
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")

log = logging.getLogger(__name__)


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
        self._fs, self._path = file_system(location, self._retries)
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
        if not body and not ranged:
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


def file_system(location: str, retries: Retries) -> tuple[Any, str]:
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
        if scheme == "s3":
            # s3fs would try five times for each of our tries.
            fs.retries = 1
        return fs, str(path)
    except ImportError as error:
        why = scrub(str(error), location)
        if EXTRAS.get(scheme):
            do = f"pip install 'dist-lm[{EXTRAS[scheme]}]'"
    except ValueError as error:
        raise ConfigError("fsspec cannot open this", where=redact(location), why=scrub(str(error), location)) from None
    raise EnvironmentFault(f"the library for {scheme}:// is not installed", where=redact(location), why=why, do=do)
