"""Object storage: data sets on a real S3 server are written, listed, read and verified, through its faults."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from s3_server import BUCKET, S3Fault, S3Server, s3_serving
from text_datasets import TextDataset, write_pairs

from dist_lm.data.cache import ShardCache
from dist_lm.data.manifest import Manifest
from dist_lm.data.retry import Retries
from dist_lm.data.shards import ShardReader
from dist_lm.data.storage import exists, join, list_files, open_file, read_bytes, write_bytes
from dist_lm.data.verify import verify_dataset
from dist_lm.errors import DataError, EnvironmentFault

ROOT = f"s3://{BUCKET}/data"


@pytest.fixture(scope="module")
def running() -> Iterator[S3Server]:
    with s3_serving() as server:
        yield server


@pytest.fixture
def server(running: S3Server) -> S3Server:
    running.faults, running.fired, running.gets = [], running.fired.__class__(), running.gets.__class__()
    return running


@pytest.fixture(scope="module")
def dataset(running: S3Server, tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    """A data set, here and in the bucket."""
    local = write_pairs(tmp_path_factory.mktemp("local"), [70, 64, 70])
    for path in sorted(local.folder.iterdir()):
        write_bytes(join(ROOT, path.name), path.read_bytes())
    return local


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def retries(waits: list[float]) -> Retries:
    return Retries(attempts=4, sleep=waits.append, random=lambda: 1.0)


def test_what_was_written_is_listed_and_read(dataset: TextDataset, server: S3Server) -> None:
    names = sorted(path.name for path in dataset.folder.iterdir())
    assert list_files(ROOT) == [join(ROOT, name) for name in names]
    assert list_files(f"{ROOT}/*.tar") == [join(ROOT, name) for name in names if name.endswith(".tar")]
    for name in names:
        assert read_bytes(join(ROOT, name)) == (dataset.folder / name).read_bytes()
    assert exists(join(ROOT, names[0]))
    assert not exists(join(ROOT, "nothing"))
    with pytest.raises(FileNotFoundError):
        read_bytes(join(ROOT, "nothing"))


def test_ranges_are_read_from_any_place(dataset: TextDataset, server: S3Server) -> None:
    content = dataset.tar(0).read_bytes()
    with open_file(join(ROOT, "s-000000.tar"), buffer_bytes=700) as file:
        for at in (1000, 20_000, 3, len(content) - 10):
            file.seek(at)
            assert file.read(1500) == content[at : at + 1500]


@pytest.mark.parametrize("with_cache", [True, False])
def test_a_data_set_in_a_bucket_is_verified_and_read(
    dataset: TextDataset, server: S3Server, tmp_path: Path, with_cache: bool
) -> None:
    manifest = Manifest.load(ROOT)
    assert manifest == dataset.manifest
    assert verify_dataset(ROOT) == manifest
    server.gets.clear()
    reader = ShardReader(ROOT, manifest, cache=ShardCache(tmp_path, 1 << 20) if with_cache else None)
    for _ in range(2):
        rows = np.concatenate([block["second"] for shard in range(3) for block in reader.blocks(shard, 0, 2)])
        expected = [dataset.columns["second"][begin : begin + 32] for begin in (0, 70, 134)]
        assert np.array_equal(rows, np.concatenate(expected))
    assert [server.gets[f"s-00000{shard}.tar"] for shard in range(3)] == ([1] * 3 if with_cache else [2] * 3)


@pytest.mark.parametrize("kind", ["slow_down", "cut"])
def test_faults_of_the_storage_change_nothing_of_what_is_read(
    dataset: TextDataset, server: S3Server, retries: Retries, waits: list[float], kind: str
) -> None:
    server.faults = [S3Fault(kind, "s-000001.tar", times=3)]
    assert read_bytes(join(ROOT, "s-000001.tar"), retries=retries) == dataset.tar(1).read_bytes()
    assert server.fired[kind] == 3
    assert waits == [0.5, 1.0, 2.0]


def test_storage_that_never_answers_is_named(
    dataset: TextDataset, server: S3Server, retries: Retries, waits: list[float]
) -> None:
    server.faults = [S3Fault("slow_down", "s-000001.tar", times=99)]
    with pytest.raises(EnvironmentFault, match=r"(?s)s3://corpus/data/s-000001\.tar.*reduce your request.*4 attempts"):
        read_bytes(join(ROOT, "s-000001.tar"), retries=retries)
    assert server.fired["slow_down"] == 4


def test_a_damaged_object_is_named_with_its_block(
    dataset: TextDataset, server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = f"s3://{BUCKET}/damaged"
    for path in dataset.folder.iterdir():
        write_bytes(join(place, path.name), path.read_bytes())
    content = bytearray(dataset.tar(2).read_bytes())
    content[dataset.offsets(2)[3] + 530] ^= 4
    write_bytes(join(place, "s-000002.tar"), bytes(content))
    with pytest.raises(DataError, match=r"s3://corpus/damaged/s-000002\.tar, block 3\)"):
        verify_dataset(place)
    caplog.clear()
    reader = ShardReader(place, dataset.manifest, cache=ShardCache(tmp_path, 1 << 20))
    with pytest.raises(DataError, match=r"s3://corpus/damaged/s-000002\.tar, block 3\)"):
        list(reader.blocks(2, 0, 1))
    # Fetched again before it was given up.
    again = [record for record in caplog.records if "another SHA-256" in record.getMessage()]
    assert len(again) == 1


def test_a_bucket_that_is_not_there_is_no_data_set(server: S3Server) -> None:
    with pytest.raises(DataError, match=r"not a data set.*s3://nowhere/data/manifest\.json"):
        Manifest.load("s3://nowhere/data")


def test_the_command_verifies_a_bucket(dataset: TextDataset, server: S3Server) -> None:
    done = subprocess.run([sys.executable, "-m", "dist_lm", "data", "verify", ROOT], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"ok: {ROOT}: 204 rows in 3 shards\n")


@pytest.mark.parametrize(("scheme", "library", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(scheme: str, library: str, extra: str) -> None:
    script = (
        f"import sys; sys.modules['{library}'] = None\n"
        "from dist_lm.data.storage import read_bytes\nfrom dist_lm.errors import EnvironmentFault\n"
        f"try: read_bytes('{scheme}://bucket/x')\nexcept EnvironmentFault as error: print(error)"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert f"pip install 'dist-lm[{extra}]'" in shown
