"""Views: rows cut from a stream of tokens, and rows that are stored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_datasets import TextDataset, flip_bit, write_pairs, write_tokens

from dist_lm.config import SourceSpec
from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.shards import ShardReader
from dist_lm.data.stream import Stream
from dist_lm.data.training_set import TrainingSet
from dist_lm.data.views import View, view_of
from dist_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.fast

SHARDS = [1000, 37, 640, 1, 129]
LENGTHS = [1, 7, 40, 64, 100, 200]
"""Shorter than a block of 64 tokens, as long, and longer."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return write_tokens(tmp_path_factory.mktemp("tokens"), SHARDS, block_tokens=64)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return write_pairs(tmp_path_factory.mktemp("pairs"), [40, 33])


def expected_rows(dataset: TextDataset, seq_len: int) -> np.ndarray:
    """All rows, shard by shard, cut by hand."""
    starts = np.concatenate([[0], np.cumsum(SHARDS)])
    return np.stack(
        [
            dataset.columns["tokens"][start + at : start + at + seq_len]
            for start, tokens in zip(starts, SHARDS, strict=False)
            for at in range(0, tokens - seq_len + 1, seq_len)
        ]
    )


def any_range(view: View, data: st.DataObject) -> tuple[int, int, int]:
    """A shard, and rows [lo, hi) of it, at least one."""
    shard = data.draw(st.sampled_from([shard for shard, rows in enumerate(view.shard_rows) if rows]))
    lo = data.draw(st.integers(0, view.shard_rows[shard] - 1))
    hi = data.draw(st.integers(lo + 1, view.shard_rows[shard]))
    return shard, lo, hi


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_range_of_rows_is_the_text_cut_at_multiples_of_the_length(
    dataset: TextDataset, data: st.DataObject
) -> None:
    seq_len = data.draw(st.sampled_from(LENGTHS))
    view = view_of(dataset.manifest, seq_len)
    assert view.shard_rows == tuple(tokens // seq_len for tokens in SHARDS)
    shard, lo, hi = any_range(view, data)
    reader = ShardReader(dataset.folder, dataset.manifest)
    rows = np.concatenate([block["tokens"] for block in view.blocks(reader, shard, lo, hi)])
    start = sum(view.shard_rows[:shard])
    assert np.array_equal(rows, expected_rows(dataset, seq_len)[start + lo : start + hi])


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_rows_that_are_read_into_an_array_are_those_of_the_blocks_and_nothing_else_is_written(
    dataset: TextDataset, data: st.DataObject
) -> None:
    seq_len = data.draw(st.sampled_from(LENGTHS))
    view = view_of(dataset.manifest, seq_len)
    shard, lo, hi = any_range(view, data)
    pool = np.full((hi - lo + 5, seq_len), 999, dtype=np.uint16)
    reader = ShardReader(dataset.folder, dataset.manifest, reuse_memory=True)
    view.read_into({"tokens": pool}, 2, reader, shard, lo, hi)
    start = sum(view.shard_rows[:shard])
    assert np.array_equal(pool[2 : 2 + hi - lo], expected_rows(dataset, seq_len)[start + lo : start + hi])
    assert (pool[:2] == 999).all()
    assert (pool[2 + hi - lo :] == 999).all()


def test_whole_blocks_are_read_to_where_they_are_wanted(dataset: TextDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[int] = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: placed.append(len(args[1])) or preadv(*args))
    view = view_of(dataset.manifest, 100)
    pool = np.zeros((10, 100), dtype=np.uint16)
    view.read_into({"tokens": pool}, 0, ShardReader(dataset.folder, dataset.manifest), 0, 0, 10)
    # A header, a content and a padding of each of 15 whole blocks; the last, of 40 tokens, is whole too.
    assert placed == [3 * 16]
    assert np.array_equal(pool.reshape(-1), dataset.columns["tokens"][:1000])


@pytest.mark.parametrize("at", [0, 124, 265, 512, 512 + 127], ids=["name", "size", "checksum", "first", "last"])
@pytest.mark.parametrize("block", [1, 5, 15])
def test_damage_of_what_was_read_to_its_place_is_told_as_everywhere(tmp_path: Path, block: int, at: int) -> None:
    victim = write_tokens(tmp_path, [1000], block_tokens=64)
    flip_bit(victim.tar(0), victim.offsets(0)[block] + (at if block < 15 else min(at, 512 + 79)))
    view = view_of(victim.manifest, 100)
    with pytest.raises(DataError) as told:
        list(view.blocks(ShardReader(victim.folder, victim.manifest), 0, 0, 10))
    pool = {"tokens": np.zeros((10, 100), dtype=np.uint16)}
    with pytest.raises(DataError) as placed:
        view.read_into(pool, 0, ShardReader(victim.folder, victim.manifest), 0, 0, 10)
    assert str(placed.value) == str(told.value)
    assert f"s-000000.tar, block {block})" in str(placed.value)


@pytest.mark.parametrize("seq_len", LENGTHS)
def test_an_epoch_of_any_length_of_rows_holds_each_row_once(dataset: TextDataset, seq_len: int) -> None:
    expected = expected_rows(dataset, seq_len)
    data = TrainingSet([SourceSpec(path=str(dataset.folder))], seed=1, lanes=2, era=4, seq_len=seq_len)
    with Stream(data, global_rows=2, rank=0, world_size=1) as stream:
        steps = [next(stream).rows for _ in range(len(expected) // 2)]
    ids = np.concatenate([rows.sample_id for rows in steps]).astype(np.int64)
    assert len(set(ids.tolist())) == len(ids)
    assert np.array_equal(np.concatenate([rows.columns["tokens"] for rows in steps]), expected[ids])


@pytest.mark.parametrize("seq_len", [7, 100])
@pytest.mark.parametrize("world_size", [1, 3])
def test_evaluation_sees_each_row_of_a_token_stream_once(dataset: TextDataset, seq_len: int, world_size: int) -> None:
    expected = expected_rows(dataset, seq_len)
    parts = []
    for rank in range(world_size):
        heldout = HeldoutRows(dataset.folder, rank=rank, world_size=world_size, micro_rows=4, seq_len=seq_len)
        parts += [rows.take(rows.real).columns["tokens"] for rows in heldout]
    assert np.array_equal(np.concatenate(parts), expected)


def test_the_fingerprint_covers_the_length_of_the_rows(dataset: TextDataset, pairs: TextDataset) -> None:
    fingerprints = {view_of(dataset.manifest, seq_len).fingerprint for seq_len in LENGTHS}
    assert len(fingerprints | {dataset.manifest.fingerprint}) == len(LENGTHS) + 1
    assert view_of(pairs.manifest, None).fingerprint == view_of(pairs.manifest, 35).fingerprint


def test_a_stream_of_tokens_wants_a_length(dataset: TextDataset) -> None:
    with pytest.raises(ConfigError, match=r"(?s)data\.seq_len is missing   \(corpus/train\).*such as 512"):
        view_of(dataset.manifest, None, where="corpus/train")
    with pytest.raises(ConfigError, match=r"data\.seq_len is 0"):
        view_of(dataset.manifest, 0)


@pytest.mark.parametrize("seq_len", [34, 36])
def test_stored_rows_have_the_length_that_they_were_packed_for(pairs: TextDataset, seq_len: int) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)seq_len is {seq_len}, .* packed for 35 tokens.*--seq-len {seq_len}"):
        view_of(pairs.manifest, seq_len)


def test_rows_longer_than_every_shard_are_refused(dataset: TextDataset) -> None:
    assert view_of(dataset.manifest, 1000).num_rows == 1
    with pytest.raises(DataError, match=r"(?s)no shard has the 1001 tokens of a row.*The longest has 1000"):
        view_of(dataset.manifest, 1001)
