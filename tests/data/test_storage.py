"""Storage: what a web server does wrong changes nothing of what is read, or ends in a named error."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from http_server import Fault, FaultyServer, serving

from dist_lm.data import remote_file
from dist_lm.data.retry import Retries
from dist_lm.data.storage import exists, list_files, open_file, read_bytes, write_bytes
from dist_lm.errors import ConfigError, EnvironmentFault

pytestmark = pytest.mark.fast
CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, dtype=np.uint8).tobytes()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultyServer]:
    (tmp_path / "x.bin").write_bytes(CONTENT)
    (tmp_path / "empty").write_bytes(b"")
    with serving(tmp_path) as running:
        yield running


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def retries(waits: list[float]) -> Retries:
    return Retries(attempts=4, stall_s=0.3, sleep=waits.append, random=lambda: 1.0, now=lambda: 1_000_000_000.0)


def test_a_file_is_read_from_any_place(server: FaultyServer, retries: Retries) -> None:
    with open_file(f"{server.url}/x.bin", buffer_bytes=1000, retries=retries) as file:
        assert file.seek(0, io.SEEK_END) == len(CONTENT)
        for at, size in [(0, 10), (299_990, 100), (5000, 1000), (5500, 7777), (300_000, 5), (400_000, 5)]:
            file.seek(at)
            assert file.read(size) == CONTENT[at : at + size]
        file.seek(-5, io.SEEK_END)
        assert file.read() == CONTENT[-5:]
    assert read_bytes(f"{server.url}/x.bin") == CONTENT
    assert read_bytes(f"{server.url}/empty") == b""


def test_an_unbuffered_read_is_one_request_for_those_bytes(server: FaultyServer, retries: Retries) -> None:
    with open_file(f"{server.url}/x.bin", size=len(CONTENT), buffer_bytes=0, retries=retries) as file:
        file.seek(1000)
        assert file.read(5000) == CONTENT[1000:6000]
    assert [(request.start, request.end) for request in server.requests] == [(1000, 6000)]


@pytest.mark.parametrize("kind", ["reset", "short", "stall"])
def test_a_broken_connection_goes_on_at_the_byte_where_it_stopped(
    server: FaultyServer, retries: Retries, kind: str
) -> None:
    server.faults = [Fault(kind, times=2)]
    assert read_bytes(f"{server.url}/x.bin", retries=retries) == CONTENT
    assert server.fired[kind] == 2
    starts = [request.start for request in server.requests]
    if kind != "reset":
        # The first request asks for the length.  A reset may cost bytes that have come already.
        assert starts == [0, 0, 150_000, 225_000]
    # Nobody begins again once something has come.
    assert starts == sorted(starts, key=lambda start: start or 0)


@pytest.mark.parametrize(("status", "retry_after"), [(500, None), (503, "7"), (429, "20"), (429, "99999")])
def test_a_server_in_trouble_is_asked_again_later(
    server: FaultyServer, retries: Retries, waits: list[float], status: int, retry_after: str | None
) -> None:
    server.faults = [Fault("status", status=status, retry_after=retry_after, times=3)]
    assert read_bytes(f"{server.url}/x.bin", retries=retries) == CONTENT
    assert server.fired["status"] == 3
    expected = {None: [0.5, 1.0, 2.0], "7": [7.0] * 3, "20": [20.0] * 3, "99999": [30.0] * 3}
    assert waits == expected[retry_after]


def test_a_retry_after_may_be_a_date(server: FaultyServer, retries: Retries, waits: list[float]) -> None:
    server.faults = [
        Fault("status", status=503, retry_after="Sun, 09 Sep 2001 01:46:52 GMT"),
        Fault("status", status=503, retry_after="soon"),
    ]
    assert read_bytes(f"{server.url}/x.bin", retries=retries) == CONTENT
    assert waits == [12.0, 1.0]


def test_the_wait_grows_up_to_a_limit_and_is_jittered() -> None:
    low, high = Retries(random=lambda: 0.0), Retries(random=lambda: 1.0)
    assert [high.wait_s(n, None) for n in (1, 2, 3, 9)] == [0.5, 1.0, 2.0, 30.0]
    assert [low.wait_s(n, None) for n in (1, 2, 3, 9)] == [0.25, 0.5, 1.0, 15.0]


@pytest.mark.parametrize("kind", ["status", "reset", "stall"])
def test_a_server_that_never_recovers_is_an_error_that_names_it(
    server: FaultyServer, retries: Retries, waits: list[float], kind: str
) -> None:
    # The length is told in one byte, of which the first half is nothing.
    server.faults = [Fault(kind, times=99, min_bytes=0)]
    with pytest.raises(EnvironmentFault, match=r"(?s)cannot read from storage.*/x\.bin.*4 attempts failed"):
        read_bytes(f"{server.url}/x.bin", retries=retries)
    assert server.fired[kind] == 4
    assert len(waits) == 3


@pytest.mark.parametrize("status", [400, 401, 403])
def test_what_no_retry_can_change_is_raised_at_once(
    server: FaultyServer, retries: Retries, waits: list[float], status: int
) -> None:
    server.faults = [Fault("status", status=status, times=99)]
    with pytest.raises(EnvironmentFault, match=str(status)):
        read_bytes(f"{server.url}/x.bin", retries=retries)
    assert (server.fired["status"], waits) == (1, [])


def test_a_missing_file_is_told_from_one_that_is_there(server: FaultyServer, retries: Retries) -> None:
    assert exists(f"{server.url}/x.bin", retries=retries)
    assert not exists(f"{server.url}/y.bin", retries=retries)
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{server.url}/y.bin", retries=retries)
    with pytest.raises(EnvironmentFault, match="cannot read from storage"):
        exists("http://127.0.0.1:1/x.bin", retries=retries)


@pytest.mark.parametrize("kind", ["shift", "lie"])
def test_a_server_that_lies_about_range_or_length_is_found_out(
    server: FaultyServer, retries: Retries, kind: str
) -> None:
    server.faults = [Fault(kind, times=99)]
    with pytest.raises(EnvironmentFault, match=r"got bytes from 1|the length was 300000 and is now 300007"):
        read_bytes(f"{server.url}/x.bin", retries=retries)
    assert server.fired[kind] == 4


def test_a_file_that_ends_before_its_length_is_found_out(server: FaultyServer, retries: Retries) -> None:
    with (
        open_file(f"{server.url}/x.bin", size=len(CONTENT) + 10, buffer_bytes=0, retries=retries) as file,
        pytest.raises(EnvironmentFault, match="the length was 300010 and is now 300000"),
    ):
        file.read()


def test_a_server_without_ranges_works_and_one_warning_tells_the_price(
    server: FaultyServer, retries: Retries, caplog: pytest.LogCaptureFixture
) -> None:
    server.ranges = False
    with open_file(f"{server.url}/x.bin", buffer_bytes=0, retries=retries) as file:
        file.seek(1000)
        assert file.read(100) == CONTENT[1000:1100]
        assert file.read() == CONTENT[1100:]
    assert read_bytes(f"{server.url}/x.bin", retries=retries) == CONTENT
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "whole files only" in warnings[0]


def test_pieces_of_a_large_file_are_asked_for_one_by_one(
    server: FaultyServer, retries: Retries, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_file, "PIECE_BYTES", 100_000)
    assert read_bytes(f"{server.url}/x.bin", retries=retries) == CONTENT
    assert [request.start for request in server.bodies_of("x.bin")] == [0, 100_000, 200_000]


@pytest.mark.parametrize("fault", [Fault("status", status=403), Fault("status", status=500, times=99)])
def test_no_error_and_no_log_line_shows_a_secret_of_the_url(
    server: FaultyServer, retries: Retries, caplog: pytest.LogCaptureFixture, fault: Fault
) -> None:
    caplog.set_level(logging.INFO)
    server.faults = [fault]
    url = server.url.replace("http://", "http://anna:pass-word@") + "/x.bin?sig=abc%2Fdef&more=wxyz"
    with pytest.raises(EnvironmentFault) as caught:
        read_bytes(url, retries=retries)
    assert server.fired["status"]
    error: BaseException | None = caught.value
    while error is not None:
        caplog.records.append(logging.makeLogRecord({"msg": f"{error} {error.args}"}))
        error = error.__cause__ if error.__suppress_context__ else error.__context__
    shown = "\n".join(record.getMessage() for record in caplog.records)
    assert "/x.bin" in shown
    assert not [secret for secret in ("anna", "pass-word", "abc/def", "abc%2Fdef", "wxyz") if secret in shown]


# ------------------------------------------------------------------------------- local files


def test_local_files_are_read_written_and_listed_like_others(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a" / "b.txt", b"one")
    write_bytes(f"file://{tmp_path}/a/c.txt", b"two")
    assert read_bytes(tmp_path / "a" / "c.txt") == b"two"
    both = [f"{tmp_path}/a/b.txt", f"{tmp_path}/a/c.txt"]
    assert list_files(tmp_path) == both
    assert list_files(f"{tmp_path}/*/[bc].txt") == both
    assert list_files(both[0]) == both[:1]
    assert exists(both[0])
    assert not exists(f"{tmp_path}/d")
    with pytest.raises(FileNotFoundError):
        read_bytes(f"{tmp_path}/d")


def test_relative_patterns_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bytes("x/a.txt", b"one")
    assert list_files("x/*.txt") == ["x/a.txt"]


# ------------------------------------------------------------------------------ what is refused


def test_a_web_server_is_neither_written_nor_listed(server: FaultyServer) -> None:
    with pytest.raises(ConfigError, match="nothing can be written"):
        write_bytes(f"{server.url}/new", b"one")
    with pytest.raises(ConfigError, match="lists no files"):
        list_files(f"{server.url}/*.tar")
    assert not server.requests


def test_a_library_that_a_scheme_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(EnvironmentFault, match="the library for gs:// is not installed") as caught:
        read_bytes("gs://bucket/x")
    assert caught.value.do == "pip install 'dist-lm[gcs]'"


def test_a_scheme_that_fsspec_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="fsspec cannot open this"):
        read_bytes("fsspec+nosuch://host/x")
