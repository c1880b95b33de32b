"""What a checkpoint in a folder promises, one in an S3 bucket promises, too."""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from moto.server import ThreadedMotoServer
from torch import distributed
from torch._C._distributed_c10d import HashStore

from dist_lm.checkpoint import commit
from dist_lm.checkpoint.commit import Retention
from dist_lm.checkpoint.copying import copy_checkpoint
from dist_lm.checkpoint.fragments import WEIGHT
from dist_lm.checkpoint.manifest import MANIFEST, Checkpoint, sealed
from dist_lm.checkpoint.reader import Reader
from dist_lm.checkpoint.store import Draft, LocalStore, Store, open_store, step_name
from dist_lm.errors import ConfigError, DataError
from tests.checkpoint.fragments_by_hand import RUN_ID, SHAPES, fragments, progress, ranks, save, values, writer


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Endpoint of an S3 server on this machine."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "folder":
        return open_store(str(tmp_path / "checkpoints"))
    import boto3
    import fsspec

    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"runs-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    fsspec.config.conf.pop("s3", None)
    return open_store(f"s3://{bucket}/one")


def corrupt(store: Store, name: str, file: str, content: bytes) -> None:
    """Replace a file of a published checkpoint behind the store's back."""
    if isinstance(store, LocalStore):
        (store.root / name / file).write_bytes(content)
    else:
        store._files.pipe_file(store._path(name, file), content)  # type: ignore[attr-defined]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_range_of_every_parameter_comes_back_whoever_wrote_it(store: Store, world_size: int) -> None:
    save(store, 4, world_size=world_size)
    checkpoint = Checkpoint.read(store, step_name(4))
    assert checkpoint.damage(checkpoint.files) == ""
    assert checkpoint.progress == progress(4)
    reader = Reader(checkpoint)
    reader.expect(SHAPES)
    # Each read of a bucket is some requests.
    stride = 1 if isinstance(store, LocalStore) else 5
    for name in SHAPES:
        for key in (WEIGHT, "exp_avg"):
            whole = values(name, key, 4)
            for start in range(0, len(whole), stride):
                for size in (1, len(whole) - start):
                    assert torch.equal(reader.read(name, key, start, size), whole[start : start + size])


def test_a_rank_file_is_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    from safetensors import safe_open

    save(LocalStore(tmp_path), 1, world_size=1)
    with safe_open(tmp_path / step_name(1) / "rank-00000.safetensors", "pt") as content:
        assert torch.equal(content.get_tensor("b.bias|exp_avg"), values("b.bias", "exp_avg", 1))
        assert set(content.keys()) == {f"{name}|{key}" for name in SHAPES for key in (WEIGHT, "exp_avg")}


def test_a_draft_is_no_checkpoint_and_is_swept(store: Store) -> None:
    save(store, 1)
    # Rank 1 of two never writes.
    alone = writer(store, 0, 2)
    alone.start(progress(2), fragments(0, 2, 2))
    alone._written.wait()
    alone.abandon()
    assert store.names() == [step_name(1)]
    assert store.read_draft(Draft(step_name(2), "0001-0001"), "rank-00000.safetensors") is not None
    store.sweep()
    assert store.read_draft(Draft(step_name(2), "0001-0001"), "rank-00000.safetensors") is None
    assert store.names() == [step_name(1)]


def test_a_checkpoint_of_another_model_or_without_a_piece_is_not_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(store, 1)
    checkpoint = Checkpoint.read(store, step_name(1))
    with pytest.raises(DataError, match="the checkpoint is of another model: 2 parameters differ") as caught:
        Reader(checkpoint).expect({**SHAPES, "a.weight": (6, 4), "c": (1,)})
    assert caught.value.why == "a.weight: saved (6, 5), wanted (6, 4)"
    checkpoint.parameters["b.bias"]["pieces"].pop()
    with pytest.raises(DataError, match=r"b\.bias\|weight: 3 of 7 elements are in the checkpoint"):
        Reader(checkpoint).weight("b.bias")


def test_a_run_whose_checkpoints_are_all_damaged_says_so_and_keeps_them(store: Store) -> None:
    for step in (1, 2):
        save(store, step, world_size=1)
        (file,) = Checkpoint.read(store, step_name(step)).files
        corrupt(store, step_name(step), file, b"short")
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(DataError, match="none of the 2 checkpoints of this run can be trusted") as caught:
            commit.newest_verified(store, ranks(), RUN_ID)
    finally:
        distributed.destroy_process_group()
    assert caught.value.where == store.location
    assert store.names() == []


@pytest.mark.parametrize("offset", [0, 3, 40, -1, -20])
def test_a_flipped_bit_anywhere_in_a_file_is_found(store: Store, offset: int) -> None:
    save(store, 3)
    for file in Checkpoint.read(store, step_name(3)).files:
        content = bytearray(store.read(step_name(3), file))
        content[offset] ^= 1
        corrupt(store, step_name(3), file, bytes(content))
        assert "does not match its SHA-256" in Checkpoint.read(store, step_name(3)).damage([file])
        corrupt(store, step_name(3), file, bytes(content[:-1]))
        assert "bytes instead of" in Checkpoint.read(store, step_name(3)).damage([file])


def test_a_torn_foreign_or_newer_manifest_is_an_error_and_never_a_guess(store: Store) -> None:
    save(store, 3)
    manifest = json.loads(store.read(step_name(3), MANIFEST))
    for content, words in [
        (b"", "cannot be read"),
        (json.dumps(manifest).encode()[:-30], "cannot be read"),
        (json.dumps({**manifest, "format": "other"}).encode(), "is not a checkpoint's manifest"),
        (json.dumps({**manifest, "version": 99}).encode(), "newer dist_lm"),
        (sealed({**manifest, "progress": {"step": 1}}), "cannot be read"),
        (json.dumps({**manifest, "run_id": "other"}).encode(), "does not match its own SHA-256"),
    ]:
        corrupt(store, step_name(3), MANIFEST, content)
        with pytest.raises(DataError, match=words):
            Checkpoint.read(store, step_name(3))


def test_a_flipped_bit_anywhere_in_a_manifest_is_found(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(store, 3)
    whole, content = Checkpoint.read(store, step_name(3)), store.read(step_name(3), MANIFEST)
    harmless = 0
    for offset in range(len(content)):
        flipped = bytearray(content)
        flipped[offset] ^= 1 << offset % 8
        corrupt(store, step_name(3), MANIFEST, bytes(flipped))
        try:
            found = Checkpoint.read(store, step_name(3))
        except DataError:
            continue
        # One white space became another.
        assert found == whole
        harmless += 1
    assert harmless < len(content.split())


def test_what_is_set_aside_is_no_longer_there_and_its_step_can_be_saved_again(store: Store) -> None:
    save(store, 3)
    save(store, 6)
    store.set_aside(step_name(6), "a test says so")
    assert store.names() == [step_name(3)]
    store.sweep()
    save(store, 6)
    assert store.names() == [step_name(6), step_name(3)]
    newest = Checkpoint.read(store, step_name(6))
    assert newest.damage(newest.files) == ""


def test_saving_a_published_step_again_replaces_it_whole(store: Store) -> None:
    save(store, 3, world_size=3)
    # No two saves have the same attempt and number: reports of the first would be taken for the second's.
    save(store, 3, world_size=2, attempt=2)
    checkpoint = Checkpoint.read(store, step_name(3))
    assert len(checkpoint.files) == 2
    assert checkpoint.damage(checkpoint.files) == ""


def test_retention_keeps_the_newest_every_nth_and_the_best(store: Store) -> None:
    for step in (1, 2, 3, 4, 5, 6):
        save(store, step, keep=9)
    store.write_pointer(commit.BEST, json.dumps({"step": 3, "metric": "loss", "value": 1.0}).encode())
    assert commit.prune(store, Retention(keep=2, keep_every=4)) == [step_name(2), step_name(1)]
    assert store.names() == [step_name(step) for step in (6, 5, 4, 3)]
    assert commit.best(store) == {"step": 3, "metric": "loss", "value": 1.0}


def test_a_copy_elsewhere_is_verified_and_a_damaged_original_is_not_copied(store: Store, tmp_path: Path) -> None:
    save(store, 5)
    there = LocalStore(tmp_path / "backup")
    copied = copy_checkpoint(Checkpoint.read(store, step_name(5)), there)
    assert torch.equal(Reader(copied).weight("a.weight"), values("a.weight", WEIGHT, 5).view(6, 5))
    assert copied.run_id == RUN_ID
    with pytest.raises(ConfigError, match="exists already"):
        copy_checkpoint(Checkpoint.read(store, step_name(5)), there)
    again = copy_checkpoint(copied, LocalStore(tmp_path / "second"))
    assert again.damage(again.files) == ""
    file = next(iter(Checkpoint.read(store, step_name(5)).files))
    corrupt(store, step_name(5), file, b"short")
    with pytest.raises(DataError, match="is damaged"):
        copy_checkpoint(Checkpoint.read(store, step_name(5)), LocalStore(tmp_path / "third"))
    assert not LocalStore(tmp_path / "third").names()


class BackAtTheFirstWarning(logging.Handler):
    """Starts the S3 server again once a writer has said that it cannot write."""

    def __init__(self, port: int) -> None:
        super().__init__(logging.WARNING)
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.warnings.append(record.getMessage())
        if len(self.warnings) == 1:
            self.server.start()


def test_an_object_store_that_is_away_during_a_save_delays_the_checkpoint_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import boto3
    import s3fs

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    boto3.client("s3").create_bucket(Bucket="away")
    s3fs.S3FileSystem.clear_instance_cache()
    store = open_store("s3://away/run")
    save(store, 1, world_size=1)
    server.stop()
    back = BackAtTheFirstWarning(port)
    logger = logging.getLogger("dist_lm.checkpoint.writer")
    logger.addHandler(back)
    try:
        saving = writer(store)
        saving.start(progress(2), fragments(0, 1, 2))
        saving._join()
        assert saving.error is None
        assert "cannot write a checkpoint yet" in back.warnings[0]
        assert store.names() == [step_name(2), step_name(1)]
        newest = Checkpoint.read(store, step_name(2))
        assert newest.damage(newest.files) == ""
    finally:
        logger.removeHandler(back)
        back.server.stop()
        s3fs.S3FileSystem.clear_instance_cache()
