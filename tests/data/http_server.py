"""A real web server on this machine whose answers a test may spoil.

It serves the files of a folder, with ranges.  Faults are taken one at each request that they are
meant for, in the order in which they were added; `fired` counts them, `requests` lists what was
asked for.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Fault:
    """What to do instead of answering properly."""

    kind: str
    """reset: half of the body, then a reset connection.  short: half of the body, then the end of the
    connection.  stall: half of the body, then nothing until the client goes away.  status: an error
    with this status.  truncate: the file seems to end after `keep` bytes.  flip: bit 0 of byte `at`
    of the file is another.  shift: another range than the one asked for.  lie: Content-Range tells a
    length that is 7 too large."""
    path: str = ""
    """Only for requests whose path ends with this."""
    times: int = 1
    min_bytes: int = 2
    """Only for answers of so many bytes or more: not for the question how long a file is."""
    status: int = 500
    retry_after: str | None = None
    keep: int = 0
    at: int = 0


@dataclass(frozen=True)
class Request:
    """What was asked for."""

    path: str
    start: int | None
    end: int | None
    """One behind the last byte."""


@dataclass
class FaultyServer:
    """Address, faults and records of the running server."""

    url: str
    folder: Path
    ranges: bool = True
    """False: the server ignores ranges."""
    faults: list[Fault] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)
    hold: threading.Event | None = None
    """If set, answers with the content of a shard wait for this event after their first half."""
    held: threading.Event = field(default_factory=threading.Event)
    """Set when an answer waits."""
    connections: list[socket.socket] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def bodies_of(self, name: str) -> list[Request]:
        """The requests for content of a file; not those for its length."""
        return [r for r in self.requests if r.path.endswith(name) and (r.end is None or r.end - (r.start or 0) > 1)]

    def take(self, path: str, num_bytes: int) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if path.endswith(fault.path) and num_bytes >= fault.min_bytes and fault.times > 0:
                    fault.times -= 1
                    self.fired[fault.kind] += 1
                    return fault
        return None

    def note(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)


@contextmanager
def serving(folder: Path, **facts: Any) -> Iterator[FaultyServer]:
    """The server of a folder, until the block ends."""
    state = FaultyServer("", folder, **facts)

    class Handler(_Handler):
        server_state = state

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            # A client went away while its next request was waited for.
            state.fired["client gone"] += 1

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = False
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        # Connections that clients keep open, and answers that stall, end now.
        if state.hold is not None:
            state.hold.set()
        for connection in state.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: FaultyServer

    def setup(self) -> None:
        super().setup()
        self.server_state.connections.append(self.connection)

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        state, path = self.server_state, urlsplit(self.path).path
        file = state.folder / path.lstrip("/")
        if not file.is_file():
            self.send_error(404)
            return
        content = file.read_bytes()
        match = _RANGE.fullmatch(self.headers.get("Range", "")) if state.ranges else None
        start, end = (int(match[1]), int(match[2]) + 1) if match else (0, len(content))
        state.note(Request(path, start if match else None, end if match else None))
        fault = state.take(path, min(end, len(content)) - start)
        kind = fault.kind if fault else ""
        if fault and kind == "status":
            self.send_response(fault.status)
            if fault.retry_after is not None:
                self.send_header("Retry-After", fault.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault and kind == "truncate":
            content = content[: fault.keep]
        if fault and kind == "flip":
            content = content[: fault.at] + bytes([content[fault.at] ^ 1]) + content[fault.at + 1 :]
        self._answer(content, start, end, kind, ranged=match is not None)

    def _answer(self, content: bytes, start: int, end: int, kind: str, *, ranged: bool) -> None:
        body = content[start:end]
        if ranged and not body:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if ranged else 200)
        if ranged:
            told_start, total = start + (kind == "shift"), len(content) + 7 * (kind == "lie")
            self.send_header("Content-Range", f"bytes {told_start}-{told_start + len(body) - 1}/{total}")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self._send(body, kind)

    def _send(self, body: bytes, kind: str) -> None:
        state, half = self.server_state, len(body) // 2
        try:
            self.wfile.write(body[:half])
            if state.hold is not None and self.path.endswith(".tar") and len(body) > 1:
                state.held.set()
                state.hold.wait()
            if kind == "stall":
                # The client gives up and closes; then this returns.
                self.connection.recv(1)
            elif kind == "reset":
                # Unsent data and a linger of zero: the kernel sends RST.
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            elif kind != "short":
                self.wfile.write(body[half:])
                return
        except OSError:
            # The client has gone, as some tests want it.
            state.fired["client gone"] += 1
        self.close_connection = True
        if kind == "reset":
            # Not socket.close(), which waits for the files made of it.
            os.close(self.connection.detach())
