"""Shards from somebody who wants harm: manifest, index and hashes fit, the archive does not.

Nothing that stands in a shard can write a file, run code, or make the reader hold more than the shard.
"""

from __future__ import annotations

import gzip
import hashlib
import os
import pickle
import tarfile
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_datasets import TextDataset, write_pairs

from dist_lm.data.shards import Manifest, ShardReader
from dist_lm.data.verify import verify_dataset
from dist_lm.errors import DataError

pytestmark = pytest.mark.fast
GIGABYTE = 1 << 30


def member(name: str, content: bytes = b"", **facts: Any) -> bytes:
    """A tar member; `facts` replace what its header says, such as its type or size."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in facts.items():
        setattr(info, key, value)
    return info.tobuf(tarfile.GNU_FORMAT) + content + b"\0" * (-len(content) % 512)


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


HOSTILE: dict[str, Callable[[bytes, Path], bytes]] = {
    "path traversal": lambda block, out: member("../../outside/x.first", b"x" * 100) + block,
    "absolute path": lambda block, out: member(f"{out}/x.first", b"x" * 100) + block,
    "symbolic link": lambda block, out: member("000001000001.first", type=tarfile.SYMTYPE, linkname=str(out)) + block,
    "hard link": lambda block, out: member("000001000001.first", type=tarfile.LNKTYPE, linkname=str(out)) + block,
    "folder": lambda block, out: member(str(out), type=tarfile.DIRTYPE, mode=0o777) + block,
    "character device": lambda block, out: member("x.first", type=tarfile.CHRTYPE, devmajor=1, devminor=5) + block,
    "block device": lambda block, out: member("x.first", type=tarfile.BLKTYPE, devmajor=8, devminor=0) + block,
    "named pipe": lambda block, out: member("x.first", type=tarfile.FIFOTYPE) + block,
    "huge extended header": lambda block, out: member("x", type=tarfile.XHDTYPE, size=8 * GIGABYTE - 1) + block,
    "extended header": lambda block, out: member("x", b"20 path=../../x.pkl\n", type=tarfile.XHDTYPE) + block,
    "extended header that declares a size": lambda block, out: (
        member("x", b"19 size=9999999999\n", type=tarfile.XHDTYPE) + block
    ),
    "global header": lambda block, out: member("x", b"20 path=../../x.pkl\n", type=tarfile.XGLTYPE) + block,
    "huge long name": lambda block, out: (
        member("././@LongLink", type=tarfile.GNUTYPE_LONGNAME, size=4 * GIGABYTE) + block
    ),
    "sparse file": lambda block, out: member("000001000001.first", type=tarfile.GNUTYPE_SPARSE) + block,
    "size beyond the shard": lambda block, out: member("000001000001.first", size=8 * GIGABYTE - 1) + block,
    "size in base 256": lambda block, out: member("000001000001.first", size=10**15) + block,
    "size beyond the block": lambda block, out: member("000001000001.first", size=len(block) + 512) + block,
    "pickle": lambda block, out: member("000001000001.pkl", pickle.dumps(Touch(out / "ran"))) + block,
    "torch pickle": lambda block, out: member("000001000001.pth", pickle.dumps(Touch(out / "ran"))) + block,
    "a column twice": lambda block, out: member("000001000001.document", b"x" * 64) + block,
    "compressed tar": lambda block, out: gzip.compress(b"\0" * 100_000_000)[:100_352].ljust(100_352, b"\0"),
    "no tar at all": lambda block, out: b"\xff" * len(block),
    "an early end": lambda block, out: b"\0" * 1024 + block,
}


def forge(dataset: TextDataset, spoil: Callable[[bytes, Path], bytes], outside: Path) -> Manifest:
    """Replace block 1 of shard 1; index and manifest tell the truth about the result."""
    content, offsets = dataset.tar(1).read_bytes(), dataset.offsets(1)
    block = spoil(content[offsets[1] : offsets[2]], outside)
    assert len(block) % 512 == 0
    grown = len(block) - (offsets[2] - offsets[1])
    content = content[: offsets[1]] + block + content[offsets[2] :]
    index = np.array([*offsets[:2], *(offset + grown for offset in offsets[2:])], dtype="<u8").tobytes()
    dataset.tar(1).write_bytes(content)
    dataset.index(1).write_bytes(index)
    entry = replace(
        dataset.manifest.shards[1],
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )
    shards = (dataset.manifest.shards[0], entry)
    manifest = replace(dataset.manifest, shards=shards)
    manifest.save(dataset.folder)
    return manifest


def files_below(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in folder.rglob("*")}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_archive_ends_in_an_error_that_names_its_block_and_touches_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside, work = tmp_path / "outside", tmp_path / "a" / "b"
    outside.mkdir()
    work.mkdir(parents=True)
    (outside / "precious").write_bytes(b"!")
    monkeypatch.chdir(work)
    dataset = write_pairs(tmp_path / "data", [70, 64])
    forge(dataset, HOSTILE[name], outside)
    before = files_below(tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"s-000001\.tar, block 1\)"):
            verify_dataset(dataset.folder)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert files_below(tmp_path) == before
    assert peak_bytes < 20 * 1024 * 1024


def test_the_forgery_of_these_tests_is_good_but_for_the_block(tmp_path: Path) -> None:
    """An unchanged block passes: what fails above fails for what was put into it."""
    dataset = write_pairs(tmp_path / "data", [70, 64])
    forge(dataset, lambda block, out: block, tmp_path)
    assert verify_dataset(dataset.folder).num_rows == 134


def test_webdataset_is_told_to_open_nothing_by_itself(tmp_path: Path) -> None:
    dataset = write_pairs(tmp_path, [20])
    ShardReader(dataset.folder, dataset.manifest)
    assert os.environ["WDS_SECURE"] == "1"


@pytest.mark.parametrize("shard", ["../s-000000.tar", "/etc/passwd", "pipe:cat x", "s-000000.tar?x", "http://host/x"])
def test_a_manifest_cannot_name_a_shard_elsewhere(tmp_path: Path, shard: str) -> None:
    dataset = write_pairs(tmp_path, [20])
    text = (tmp_path / "manifest.json").read_text().replace("s-000000.tar", shard)
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"(?s)wrong field.*shards.0.name"):
        Manifest.load(dataset.folder)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda offsets: [*offsets, offsets[-1] + 512], id="too-many"),
        pytest.param(lambda offsets: offsets[:-1], id="too-few"),
        pytest.param(lambda offsets: [offsets[1], offsets[0], *offsets[2:]], id="backwards"),
        pytest.param(lambda offsets: [*offsets[:-1], 1 << 62], id="beyond-the-shard"),
    ],
)
def test_an_index_that_fits_its_hash_and_not_the_shard_is_refused(
    tmp_path: Path, change: Callable[[list[int]], list[int]]
) -> None:
    dataset = write_pairs(tmp_path, [70, 64])
    index = np.array(change(dataset.offsets(1)), dtype="<u8").tobytes()
    dataset.index(1).write_bytes(index)
    entry = replace(dataset.manifest.shards[1], index_sha256=hashlib.sha256(index).hexdigest())
    replace(dataset.manifest, shards=(dataset.manifest.shards[0], entry)).save(tmp_path)
    with pytest.raises(DataError, match=r"s-000001\.tar\.idx\)"):
        verify_dataset(tmp_path)
