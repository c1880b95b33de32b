"""A real S3 server on this machine (moto's) whose answers a test may spoil."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

BUCKET = "corpus"
SLOW_DOWN = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)


@dataclass
class S3Fault:
    """slow_down: status 503.  cut: half of the content, then a reset connection."""

    kind: str
    path: str
    """Only for content of keys that end with this."""
    times: int = 1


@dataclass
class S3Server:
    """Address, faults and records of the running server; the environment leads s3fs to it."""

    url: str
    faults: list[S3Fault] = field(default_factory=list)
    fired: Counter[str] = field(default_factory=Counter)
    gets: Counter[str] = field(default_factory=Counter)
    """Requests for content, by the last part of the key."""
    stop: Callable[[], None] = lambda: None
    """Let it die: connections are refused from then on."""
    start: Callable[[], object] = lambda: None
    """Let it come back, at the same address and with what it held."""

    def spoilt(self, app: Callable[..., Iterable[bytes]]) -> Callable[..., Iterable[bytes]]:
        """The application with the faults in front."""

        def answer(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
            path = environ["PATH_INFO"]
            if environ["REQUEST_METHOD"] != "GET" or path.count("/") < 2:
                return app(environ, start_response)
            self.gets[path.rpartition("/")[2]] += 1
            for fault in self.faults:
                if path.endswith(fault.path) and fault.times > 0:
                    fault.times -= 1
                    self.fired[fault.kind] += 1
                    if fault.kind == "slow_down":
                        start_response("503 Slow Down", [("Content-Type", "application/xml")])
                        return [SLOW_DOWN]
                    return self._cut(b"".join(app(environ, start_response)))
            return app(environ, start_response)

        return answer

    def _cut(self, content: bytes) -> Iterator[bytes]:
        yield content[: len(content) // 2]
        raise ConnectionResetError


@contextmanager
def s3_serving() -> Iterator[S3Server]:
    """The server with one empty bucket, and the environment variables that lead to it."""
    import boto3
    import s3fs
    from moto.server import ThreadedMotoServer

    state = S3Server("")

    def start(port: int = 0) -> int:
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        server.start()
        server._server.app = state.spoilt(server._server.app)  # type: ignore[union-attr]
        state.stop = server.stop
        return server.get_host_and_port()[1]

    port = start()
    state.url, state.start = f"http://127.0.0.1:{port}", partial(start, port)
    environment = {
        "AWS_ENDPOINT_URL": state.url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        # Our own retries are to be seen, not those of botocore.
        "AWS_MAX_ATTEMPTS": "1",
        "PYTHONPATH": os.pathsep.join([os.environ["PYTHONPATH"], *filter(None, sys.path)]),
    }
    with mock.patch.dict(os.environ, environment):
        try:
            boto3.client("s3").create_bucket(Bucket=BUCKET)
            yield state
        finally:
            state.stop()
            s3fs.S3FileSystem.clear_instance_cache()
