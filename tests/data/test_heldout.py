"""The rows of evaluation: each exactly once, and every rank with as much to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from text_datasets import TextDataset, flip_bit, write_pairs

from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.manifest import Manifest
from dist_lm.data.order import partner_rows
from dist_lm.data.rows import Rows
from dist_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.fast

SHARDS = [70, 1, 33]
ROWS = sum(SHARDS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return write_pairs(tmp_path_factory.mktemp("heldout"), SHARDS, block_rows=16)


def open_rows(dataset: TextDataset, **changes: Any) -> HeldoutRows:
    facts: dict[str, Any] = {"rank": 0, "world_size": 1, "micro_rows": 8, **changes}
    return HeldoutRows(dataset.folder, **facts)


def real_ids(micro_batches: list[Rows]) -> list[int]:
    return [int(i) for rows in micro_batches for i in rows.take(rows.real).sample_id]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 103, 104, 110])
@pytest.mark.parametrize("micro_rows", [1, 8, 17, 300])
@pytest.mark.parametrize("limit_rows", [None, 1, 50, 1000])
def test_all_ranks_together_see_each_row_once_and_work_equally_long(
    dataset: TextDataset, world_size: int, micro_rows: int, limit_rows: int | None
) -> None:
    seen, lengths = [], set()
    for rank in range(world_size):
        rows = open_rows(dataset, rank=rank, world_size=world_size, micro_rows=micro_rows, limit_rows=limit_rows)
        micro_batches = list(rows)
        assert all(len(batch) == micro_rows for batch in micro_batches)
        assert len(rows) == len(micro_batches)
        lengths.add(len(micro_batches))
        seen += real_ids(micro_batches)
    num_rows = min(limit_rows or ROWS, ROWS)
    assert seen == list(range(num_rows))
    assert lengths == {-(-(-(-num_rows // world_size)) // micro_rows)}  # noqa: B002 - rounds up, twice


def test_rows_and_fillers_carry_the_content_of_their_identity(dataset: TextDataset) -> None:
    fillers = 0
    for rank in range(3):
        for batch in open_rows(dataset, rank=rank, world_size=3, micro_rows=20):
            fillers += int((~batch.real).sum())
            for name, whole in dataset.columns.items():
                assert np.array_equal(batch.columns[name], whole[batch.sample_id.astype(np.int64)])
            assert not batch.epoch.any()
    assert fillers == 3 * 40 - ROWS


def test_the_second_pass_equals_the_first(dataset: TextDataset) -> None:
    rows = open_rows(dataset, partner_columns=("second",), seed=3)
    for one, two in zip(rows, rows, strict=True):
        assert one.sample_id.tolist() == two.sample_id.tolist()
        assert np.array_equal(one.columns["partner_second"], two.columns["partner_second"])


@pytest.mark.parametrize("world_size", [1, 4])
def test_partners_do_not_depend_on_ranks_or_micro_batches(dataset: TextDataset, world_size: int) -> None:
    starts = {0: 70, 70: 1, 71: 33}
    for rank in range(world_size):
        for batch in open_rows(
            dataset, rank=rank, world_size=world_size, micro_rows=5, partner_columns=("second",), seed=3
        ):
            for at, sample_id in enumerate(batch.sample_id.tolist()):
                start = max(start for start in starts if start <= sample_id)
                first = (sample_id - start) // 16 * 16
                rows = min(16, starts[start] - first)
                row = sample_id - start - first
                partner = int(partner_rows(row, rows, seed=3, epoch=0, sample_id=sample_id))
                expected = dataset.columns["second"][start + first + partner]
                assert np.array_equal(batch.columns["partner_second"][at], expected)


def test_a_pass_given_up_half_way_does_not_disturb_the_next(dataset: TextDataset) -> None:
    rows = open_rows(dataset)
    next(iter(rows))
    assert real_ids(list(rows)) == list(range(ROWS))


def test_damage_is_named(dataset: TextDataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "victim")
    victim = TextDataset(tmp_path / "victim", dataset.manifest, dataset.columns)
    flip_bit(victim.tar(2), victim.offsets(2)[1] + 520)
    with pytest.raises(DataError, match=r"s-000002\.tar, block 1\)"):
        list(open_rows(victim))


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    whole = write_pairs(tmp_path / "whole", [5]).manifest
    empty = Manifest(
        kind="pairs",
        columns=whole.columns,
        block_rows=16,
        seq_len=35,
        vocab_size=256,
        tokenizer_sha256=whole.tokenizer_sha256,
        num_rows=0,
        num_tokens=0,
        shards=(),
    )
    (tmp_path / "empty").mkdir()
    empty.save(tmp_path / "empty")
    with pytest.raises(DataError, match="has no rows"):
        HeldoutRows(tmp_path / "empty", rank=0, world_size=1, micro_rows=4)


@pytest.mark.parametrize("changes", [{"rank": 1}, {"rank": -1}, {"micro_rows": 0}, {"limit_rows": 0}])
def test_impossible_settings_are_configuration_errors(dataset: TextDataset, changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        open_rows(dataset, **changes)
