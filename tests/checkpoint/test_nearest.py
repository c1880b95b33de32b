"""Copies on the machines: whose files a rank keeps, how many, and what is read where there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.checkpoint.fragments import WEIGHT
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.nearest import LocalCopies
from dist_lm.checkpoint.reader import Reader
from dist_lm.checkpoint.store import LocalStore, step_name
from dist_lm.errors import DataError
from tests.checkpoint.fragments_by_hand import fragments, progress, ranks, save, writer

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("machines", "kept"),
    [
        ([[0, 1, 2]], [[], [], []]),
        ([[0], [1]], [[1], [0]]),
        ([[0, 1], [2, 3], [4, 5]], [[4], [5], [0], [1], [2], [3]]),
        ([[0, 1, 2], [3]], [[3], [], [], [0, 1, 2]]),
    ],
)
def test_each_file_is_kept_by_one_rank_of_the_next_machine(
    machines: list[list[int]], kept: Sequence[list[int]], tmp_path: Path
) -> None:
    for rank, files in enumerate(kept):
        assert LocalCopies(tmp_path, ranks(rank, len(kept)), machines).neighbours() == files


def test_the_copy_is_the_file_itself_and_the_last_two_stay(tmp_path: Path) -> None:
    store, folder = LocalStore(tmp_path / "store"), tmp_path / "near"
    saving = writer(store, copies=LocalCopies(folder, ranks(), [[0]]))
    for step in (1, 2, 3):
        saving.start(progress(step), fragments(0, 1, step))
        saving._join()
        assert saving.error is None
    assert sorted(path.name for path in folder.iterdir()) == [
        f"{step_name(step)}-rank-00000.safetensors" for step in (2, 3)
    ]
    for path in folder.iterdir():
        name, _, file = path.name.partition("-rank")
        assert path.read_bytes() == store.read(name, f"rank{file}")


def test_a_copy_that_cannot_be_written_costs_no_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    saving = writer(LocalStore(tmp_path / "store"), copies=LocalCopies(tmp_path / "file" / "near", ranks(), [[0]]))
    saving.start(progress(1), fragments(0, 1, 1))
    saving._join()
    assert saving.error is None
    assert LocalStore(tmp_path / "store").names() == [step_name(1)]
    assert "cannot keep a copy" in caplog.text


def test_a_file_that_nobody_has_verified_is_verified_before_it_is_read(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(store, 1, world_size=2)
    checkpoint = Checkpoint.read(store, step_name(1))
    file = tmp_path / step_name(1) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")
    doubted = replace(checkpoint, unchecked={*checkpoint.files})
    assert Reader(doubted).read("b.bias", WEIGHT, 0, 3).tolist() == [1000.0, 1002.0, 1004.0]
    with pytest.raises(DataError, match="does not match its SHA-256"):
        Reader(doubted).read("b.bias", WEIGHT, 3, 4)
