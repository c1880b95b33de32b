"""The cache of remote shards: one download, verified copies, a limit, and a disk that may fail."""

from __future__ import annotations

import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from http_server import Fault, FaultyServer, serving
from text_datasets import TextDataset, flip_bit, write_pairs

from dist_lm.data.cache import FOLDER, ShardCache, key_of
from dist_lm.data.manifest import Manifest
from dist_lm.data.retry import Retries
from dist_lm.data.shards import ShardReader
from dist_lm.errors import DataError

SHARDS = [70, 64, 70]
MEGABYTE = 1 << 20
RETRIES = Retries(attempts=3, stall_s=5.0, sleep=lambda _: None)


@pytest.fixture
def dataset(tmp_path: Path) -> TextDataset:
    return write_pairs(tmp_path / "origin" / "data", SHARDS)


@pytest.fixture
def server(dataset: TextDataset) -> Iterator[FaultyServer]:
    with serving(dataset.folder.parent) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def reader_of(server: FaultyServer, cache: ShardCache | None, name: str = "data") -> ShardReader:
    location = f"{server.url}/{name}"
    return ShardReader(location, Manifest.load(location), cache=cache)


def read(reader: ShardReader, shard: int) -> np.ndarray:
    blocks = reader.blocks(shard, 0, reader.manifest.shards[shard].blocks)
    return np.concatenate([block["second"] for block in blocks])


def rows_of(dataset: TextDataset, shard: int) -> np.ndarray:
    begin = sum(SHARDS[:shard])
    return dataset.columns["second"][begin : begin + SHARDS[shard]]


def downloads(server: FaultyServer, shard: int) -> int:
    return len(server.bodies_of(f"s-{shard:06d}.tar"))


def cached(folder: Path) -> set[str]:
    return {path.name.partition("-")[2] for path in (folder / FOLDER).iterdir() if path.is_file()}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


# ------------------------------------------------------------------------------ what is kept


def test_a_shard_is_downloaded_once_and_read_from_the_copy(
    dataset: TextDataset, server: FaultyServer, folder: Path
) -> None:
    for _ in range(2):
        reader = reader_of(server, ShardCache(folder, MEGABYTE))
        for shard in (0, 1, 2, 0):
            assert np.array_equal(read(reader, shard), rows_of(dataset, shard))
    assert [downloads(server, shard) for shard in range(3)] == [1, 1, 1]
    assert cached(folder) == {"s-000000.tar", "s-000001.tar", "s-000002.tar"}


def test_two_data_sets_with_the_same_shard_names_do_not_meet(
    dataset: TextDataset, server: FaultyServer, folder: Path
) -> None:
    other = write_pairs(dataset.folder.parent / "other", [64, 64], block_rows=32)
    cache = ShardCache(folder, MEGABYTE)
    assert np.array_equal(read(reader_of(server, cache), 0), rows_of(dataset, 0))
    assert np.array_equal(read(reader_of(server, cache, "other"), 0), other.columns["second"][:64])
    assert downloads(server, 0) == 2
    assert len(list((folder / FOLDER).glob("*-s-000000.tar"))) == 2


def test_a_copy_does_not_depend_on_users_and_signatures() -> None:
    assert key_of("https://h/a/s-000000.tar?sig=1") == key_of("https://anna:word@h/a/s-000000.tar?sig=2")
    assert key_of("https://h/a/s-000000.tar") != key_of("https://h/b/s-000000.tar")
    assert key_of("abfss://box@account/a.tar") != key_of("abfss://bag@account/a.tar")
    assert key_of("https://h/a/..%2f$x y").endswith("-.._2f_x_y")


def test_a_data_set_on_this_machine_is_read_in_place(dataset: TextDataset, folder: Path) -> None:
    reader = ShardReader(dataset.folder, dataset.manifest, cache=ShardCache(folder, MEGABYTE))
    assert np.array_equal(read(reader, 0), rows_of(dataset, 0))
    assert cached(folder) == set()


# --------------------------------------------------------------------------- what is damaged


@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
def test_a_copy_that_went_bad_is_noticed_and_fetched_again(
    dataset: TextDataset, server: FaultyServer, folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    read(reader_of(server, ShardCache(folder, MEGABYTE)), 0)
    (copy,) = (folder / FOLDER).glob("*.tar")
    if damage == "flip":
        flip_bit(copy, 3000)
    elif damage == "cut":
        os.truncate(copy, 3000)
    else:
        copy.write_bytes(dataset.tar(2).read_bytes())
    # The next run notices, as it looks at what it did not fetch itself.
    assert np.array_equal(read(reader_of(server, ShardCache(folder, MEGABYTE)), 0), rows_of(dataset, 0))
    assert downloads(server, 0) == 2
    assert ["damaged" in warning for warning in warnings_of(caplog)] == [True]


@pytest.mark.parametrize(("at", "name"), [(515, "0.tar"), (3, "0.tar"), (8, "0.tar.idx")])
@pytest.mark.parametrize("with_cache", [True, False])
def test_a_bit_that_flips_on_the_way_is_noticed_and_fetched_again(
    dataset: TextDataset, server: FaultyServer, folder: Path, at: int, name: str, with_cache: bool
) -> None:
    server.faults = [Fault("flip", path=name, at=at)]
    reader = reader_of(server, ShardCache(folder, MEGABYTE) if with_cache else None)
    assert np.array_equal(read(reader, 0), rows_of(dataset, 0))
    assert server.fired["flip"] == 1
    assert len(server.bodies_of(name)) == 2


@pytest.mark.parametrize(
    ("fault", "block", "why"),
    [
        (Fault("flip", path="2.tar", at=512 + 40, times=99), 0, "The content of 000002000000"),
        (Fault("flip", path="2.tar", at=3, times=99), 0, "header|Found the member"),
        (Fault("truncate", path="2.tar", keep=9000, times=99, min_bytes=0), None, "has 9000 bytes"),
    ],
)
@pytest.mark.parametrize("with_cache", [True, False])
def test_a_shard_that_is_damaged_where_it_lies_ends_in_an_error_that_names_shard_and_block(
    dataset: TextDataset,
    server: FaultyServer,
    folder: Path,
    fault: Fault,
    block: int | None,
    why: str,
    with_cache: bool,
) -> None:
    server.faults = [Fault(**vars(fault))]
    block = int(np.searchsorted(dataset.offsets(2), 9000, side="right")) - 1 if block is None else block
    reader = reader_of(server, ShardCache(folder, MEGABYTE) if with_cache else None)
    with pytest.raises(DataError, match=rf"(?s)/data/s-000002\.tar, block {block}\).*({why})"):
        read(reader, 2)
    assert server.fired[fault.kind]
    # Not even a trace of it is kept.
    assert cached(folder) == set() if with_cache else True


@pytest.mark.parametrize("with_cache", [True, False])
def test_a_shard_that_was_exchanged_for_another_is_found_out(
    dataset: TextDataset, server: FaultyServer, folder: Path, with_cache: bool
) -> None:
    reader = reader_of(server, ShardCache(folder, MEGABYTE) if with_cache else None)
    assert dataset.tar(0).stat().st_size == dataset.tar(2).stat().st_size
    dataset.tar(0).write_bytes(dataset.tar(2).read_bytes())
    with pytest.raises(DataError, match=r"s-000000\.tar, block 0\)"):
        read(reader, 0)


@pytest.mark.parametrize("with_cache", [True, False])
def test_a_missing_remote_shard_is_named(
    dataset: TextDataset, server: FaultyServer, folder: Path, with_cache: bool
) -> None:
    reader = reader_of(server, ShardCache(folder, MEGABYTE) if with_cache else None)
    dataset.tar(1).unlink()
    with pytest.raises(DataError, match=r"(?s)s-000001\.tar, block 0\).*missing"):
        read(reader, 1)


# ------------------------------------------------------------------------------- the limit


def test_what_is_needed_last_goes_first(dataset: TextDataset, server: FaultyServer, folder: Path) -> None:
    sizes = [entry.bytes for entry in dataset.manifest.shards]
    cache = ShardCache(folder, sum(sizes) - 1)
    reader = reader_of(server, cache)
    ahead = {f"{server.url}/data/s-000000.tar": 5.0, f"{server.url}/data/s-000001.tar": 900.0}
    cache.next_use = lambda: ahead
    for shard in range(3):
        read(reader, shard)
    assert cached(folder) == {"s-000000.tar", "s-000002.tar"}
    # What is not needed again at all goes before that.
    read(reader, 1)
    assert cached(folder) == {"s-000000.tar", "s-000001.tar"}


def test_without_a_plan_what_was_used_longest_ago_goes_first(
    dataset: TextDataset, server: FaultyServer, folder: Path
) -> None:
    ticks = itertools.count(time.time_ns(), 10**9)
    cache = ShardCache(folder, sum(entry.bytes for entry in dataset.manifest.shards) - 1, now_ns=lambda: next(ticks))
    reader = reader_of(server, cache)
    for shard in (0, 1, 0, 2):
        read(reader, shard)
    assert cached(folder) == {"s-000000.tar", "s-000002.tar"}


def test_a_file_that_is_being_read_is_never_removed(
    dataset: TextDataset, server: FaultyServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(folder, dataset.manifest.shards[0].bytes)
    reader = reader_of(server, cache)
    blocks = reader.blocks(0, 0, 5)
    next(blocks)
    # There is no room for shard 1 while shard 0 is open: it is read where it lies.
    assert np.array_equal(read(reader, 1), rows_of(dataset, 1))
    assert cached(folder) == {"s-000000.tar"}
    assert len(list(blocks)) == 4
    read(reader, 1)
    assert cached(folder) == {"s-000001.tar"}
    assert len(warnings_of(caplog)) == 1


def test_nothing_outside_and_nothing_of_others_is_removed(
    dataset: TextDataset, server: FaultyServer, folder: Path
) -> None:
    (folder / FOLDER).mkdir(parents=True)
    theirs = [folder / "s-000000.tar", folder / FOLDER / "notes.txt", folder / FOLDER / "0123456789abcdef-link.tar"]
    theirs[0].write_bytes(b"x" * MEGABYTE)
    theirs[1].write_bytes(b"y" * MEGABYTE)
    theirs[2].symlink_to(theirs[0])
    reader = reader_of(server, ShardCache(folder, dataset.manifest.shards[0].bytes))
    for shard in range(3):
        assert np.array_equal(read(reader, shard), rows_of(dataset, shard))
    assert theirs[0].stat().st_size == theirs[1].stat().st_size == MEGABYTE
    assert theirs[2].is_symlink()


def test_a_shard_larger_than_the_limit_is_read_without_the_cache(
    dataset: TextDataset, server: FaultyServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    reader = reader_of(server, ShardCache(folder, 1000))
    for shard in range(3):
        assert np.array_equal(read(reader, shard), rows_of(dataset, shard))
    assert cached(folder) == set()
    assert [("limit of 1000 bytes" in text) for text in warnings_of(caplog)] == [True]


# ------------------------------------------------------------------------- disks that refuse


def test_a_full_disk_costs_a_warning_and_nothing_else(server: FaultyServer, folder: Path) -> None:
    """A file system of 64 KiB, in a name space of its own that goes with the process."""
    folder.mkdir()
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mounted += [f'mount -t tmpfs -o size=64k tmpfs {folder} && exec "$@"', "sh"]
    shown = run_reader(server, folder, prefix=mounted, before="import os; print(os.statvfs(folder).f_blocks)")
    assert shown.startswith("16\n")
    assert "No space left" in shown
    assert shown.count("reading shards without it") == 1
    assert shown.endswith("read 204 rows\n")


def test_a_limit_on_file_sizes_costs_a_warning_and_nothing_else(server: FaultyServer, folder: Path) -> None:
    shown = run_reader(server, folder, before="resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))")
    assert "File too large" in shown
    assert shown.count("reading shards without it") == 1
    assert shown.endswith("read 204 rows\n")


def test_a_cache_folder_that_cannot_be_made_costs_a_warning_and_nothing_else(
    dataset: TextDataset, server: FaultyServer, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write_bytes(b"a file")
    reader = reader_of(server, ShardCache(folder, MEGABYTE))
    assert np.array_equal(read(reader, 0), rows_of(dataset, 0))
    assert ["Not a directory" in text for text in warnings_of(caplog)] == [True]


# ------------------------------------------------------------------------- several processes

SCRIPT = """
import logging, resource, sys
from pathlib import Path
from dist_lm.data.cache import ShardCache
from dist_lm.data.manifest import Manifest
from dist_lm.data.shards import ShardReader
logging.basicConfig(stream=sys.stdout, format="%(message)s")
url, folder = sys.argv[1:3]
{before}
reader = ShardReader(url, Manifest.load(url), cache=ShardCache(Path(folder), 1 << 20))
rows = 0
for shard, entry in enumerate(reader.manifest.shards):
    for block in reader.blocks(shard, 0, entry.blocks):
        rows += len(block["second"])
print(f"read {{rows}} rows")
"""


def start_reader(
    server: FaultyServer, folder: Path, before: str = "", prefix: Sequence[str] = ()
) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT.format(before=before), f"{server.url}/data", str(folder)]
    return subprocess.Popen([*prefix, *command], stdout=subprocess.PIPE, text=True)


def run_reader(server: FaultyServer, folder: Path, before: str = "", prefix: Sequence[str] = ()) -> str:
    process = start_reader(server, folder, before, prefix)
    shown, _ = process.communicate()
    assert process.returncode == 0
    return shown


def test_four_processes_that_want_one_shard_download_it_once(server: FaultyServer, folder: Path) -> None:
    processes = [start_reader(server, folder) for _ in range(4)]
    assert [process.communicate()[0] for process in processes] == ["read 204 rows\n"] * 4
    assert [downloads(server, shard) for shard in range(3)] == [1, 1, 1]


def test_a_process_killed_in_a_download_leaves_nothing_that_hinders_the_next(
    dataset: TextDataset, server: FaultyServer, folder: Path
) -> None:
    server.hold = threading.Event()
    victim = start_reader(server, folder)
    server.held.wait()
    victim.kill()
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    left = list((folder / FOLDER).glob("*.tmp"))
    assert [path.stat().st_size for path in left] == [dataset.manifest.shards[0].bytes]
    server.hold.set()
    # There is room for the three shards, but not for what the victim left.
    reader = reader_of(server, ShardCache(folder, sum(entry.bytes for entry in dataset.manifest.shards)))
    for shard in range(3):
        assert np.array_equal(read(reader, shard), rows_of(dataset, shard))
    assert cached(folder) == {"s-000000.tar", "s-000001.tar", "s-000002.tar"}
