"""Blocks that stand for damaged ones: which, how many rows of them, and when no more."""

from __future__ import annotations

import pickle
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm.config import SourceSpec
from dist_lm.data.cache import ShardCache
from dist_lm.data.damage import WHOLE_SHARD, DamagedData, damaged, extend, new_damage
from dist_lm.data.manifest import Manifest
from dist_lm.data.shards import ShardReader
from dist_lm.data.stream import Stream
from dist_lm.data.substitutes import SubstitutingReader
from dist_lm.data.training_set import TrainingSet
from dist_lm.data.verify import verify_dataset
from dist_lm.errors import ConfigError, DataError
from tests.data.http_server import serving
from tests.data.text_datasets import TextDataset, flip_bit, write_pairs

pytestmark = pytest.mark.fast
SHARDS = (70, 40, 64)
"""Rows; blocks of 16, so that two shards end in a smaller block."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return write_pairs(tmp_path_factory.mktemp("damage"), SHARDS, block_rows=16)


@pytest.fixture
def victim(dataset: TextDataset, tmp_path: Path) -> TextDataset:
    shutil.copytree(dataset.folder, tmp_path / "victim")
    return TextDataset(tmp_path / "victim", dataset.manifest, dataset.columns)


def block(dataset: TextDataset, shard: int, number: int) -> dict[str, np.ndarray]:
    (found,) = ShardReader(dataset.folder, dataset.manifest).blocks(shard, number, number + 1)
    return found


def substituted(dataset: TextDataset, quarantine: set[tuple[int, int]], shard: int) -> list[dict[str, np.ndarray]]:
    reader = SubstitutingReader(dataset.folder, dataset.manifest, quarantine)
    return list(reader.blocks(shard, 0, dataset.manifest.shards[shard].blocks))


@pytest.mark.parametrize(
    ("quarantine", "shard", "expected"),
    [
        pytest.param(set(), 0, [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)], id="nothing"),
        pytest.param({(0, 1)}, 0, [(0, 0), (0, 2), (0, 2), (0, 3), (0, 4)], id="the next"),
        pytest.param({(0, 1), (0, 2)}, 0, [(0, 0), (0, 3), (0, 3), (0, 3), (0, 4)], id="the next that is whole"),
        pytest.param({(0, 3)}, 0, [(0, 0), (0, 1), (0, 2), (0, 4), (0, 4)], id="a shorter one, repeated"),
        pytest.param({(0, 4)}, 0, [(0, 0), (0, 1), (0, 2), (0, 3), (0, 0)], id="a longer one, cut; round the end"),
        pytest.param({(1, WHOLE_SHARD)}, 1, [(2, 0), (2, 1), (2, 2)], id="a whole shard by the next"),
        pytest.param({(2, WHOLE_SHARD), (0, 1)}, 2, [(0, 0), (0, 2), (0, 2), (0, 3)], id="the last shard by the first"),
        pytest.param({(1, 0), (1, 1), (1, 2)}, 1, [(2, 0), (2, 1), (2, 2)], id="all blocks of a shard"),
        pytest.param({(0, 1)}, 1, [(1, 0), (1, 1), (1, 2)], id="another shard"),
    ],
)
def test_the_next_whole_block_stands_for_one_in_quarantine(
    dataset: TextDataset, quarantine: set[tuple[int, int]], shard: int, expected: list[tuple[int, int]]
) -> None:
    found = substituted(dataset, quarantine, shard)
    for number, (columns, place) in enumerate(zip(found, expected, strict=True)):
        wanted = dataset.manifest.block_rows_of(shard, number)
        whole = block(dataset, *place)
        for name, array in columns.items():
            length = len(whole[name])
            np.testing.assert_array_equal(array, np.concatenate([whole[name]] * wanted)[np.arange(wanted) % length])


def test_without_any_whole_block_reading_ends(dataset: TextDataset) -> None:
    everything = {(shard, WHOLE_SHARD) for shard in range(len(SHARDS))}
    with pytest.raises(DataError, match="every block of a data set is damaged"):
        substituted(dataset, everything, 1)


@pytest.mark.parametrize("found_first", [False, True])
def test_a_stand_in_that_is_damaged_itself_is_told_and_the_end_does_not_depend_on_what_was_known_first(
    victim: TextDataset, found_first: bool
) -> None:
    flip_bit(victim.tar(0), victim.offsets(0)[2] + 520)
    quarantine = {(0, 1)}
    if not found_first:
        with pytest.raises(DamagedData) as caught:
            substituted(victim, quarantine, 0)
        assert caught.value.place == (0, 0, 2)
    found = substituted(victim, {*quarantine, (0, 2)}, 0)
    np.testing.assert_array_equal(found[1]["first"], block(victim, 0, 3)["first"])


def _remove(dataset: TextDataset) -> None:
    dataset.tar(1).unlink()


def _cut(dataset: TextDataset) -> None:
    with dataset.tar(1).open("rb+") as file:
        file.truncate(dataset.offsets(1)[2])


def _no_index(dataset: TextDataset) -> None:
    dataset.index(1).unlink()


def _wrong_index(dataset: TextDataset) -> None:
    flip_bit(dataset.index(1), 3)


def _content(dataset: TextDataset) -> None:
    flip_bit(dataset.tar(1), dataset.offsets(1)[2] + 520)


def _header(dataset: TextDataset) -> None:
    flip_bit(dataset.tar(1), dataset.offsets(1)[2] + 3)


CASES = [(_remove, WHOLE_SHARD), (_cut, WHOLE_SHARD), (_no_index, WHOLE_SHARD), (_wrong_index, WHOLE_SHARD)]
CASES += [(_content, 2), (_header, 2)]


@pytest.mark.parametrize(("harm", "number"), CASES)
def test_damage_tells_its_place_through_the_stream_and_across_processes(
    dataset: TextDataset, victim: TextDataset, harm: Any, number: int
) -> None:
    harm(victim)
    specs = [SourceSpec(path=str(dataset.folder)), SourceSpec(path=str(victim.folder))]
    data = TrainingSet(specs, seed=3, lanes=2, era=16)
    facts: dict[str, Any] = {"global_rows": 16, "rank": 0, "world_size": 1}
    with Stream(data, **facts) as stream, pytest.raises(DamagedData) as caught:
        list(islice(stream, 30))
    error = pickle.loads(pickle.dumps(caught.value))
    assert type(error) is DamagedData
    assert error.place == (1, 1, number)
    assert str(error) == str(caught.value)
    assert "s-000001.tar" in error.where
    with Stream(data, **facts, quarantine=[error.place]) as stream:
        assert len(list(islice(stream, 30))) == 30
    with pytest.raises(DamagedData):
        verify_dataset(victim.folder)


def test_a_shard_that_the_cache_refuses_is_read_where_it_lies(victim: TextDataset, tmp_path: Path) -> None:
    _content(victim)
    with serving(tmp_path) as server:
        location = f"{server.url}/victim"
        cache = ShardCache(tmp_path / "cache", 1 << 20)
        with pytest.raises(DamagedData) as caught:
            list(ShardReader(location, Manifest.load(location), cache=cache).blocks(1, 0, 1))
        assert caught.value.place == (0, 1, 2)
        reader = SubstitutingReader(location, victim.manifest, {(1, 2)}, cache=cache)
        found = list(reader.blocks(1, 0, 3))
    expected = substituted(victim, {(1, 2)}, 1)
    for columns, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(columns["first"], wanted["first"])


def _damage(*place: int) -> DamagedData:
    source, shard, number = place
    return damaged(f"s-{shard:06d}.tar", number, "It is.").at(source=source, shard=shard)


def test_the_quarantine_holds_each_place_once_and_in_order() -> None:
    found = new_damage([None, _damage(1, 0, 2), _damage(0, 3, 1), _damage(1, 0, 2), _damage(0, 0, 0)], [(0, 0, 0)])
    assert [damage.place for damage in found] == [(0, 3, 1), (1, 0, 2)]
    assert extend([(0, 9, 9), (0, 0, 0)], found, limit=4) == [(0, 0, 0), (0, 3, 1), (0, 9, 9), (1, 0, 2)]


def test_another_failure_beside_damage_is_not_covered_by_it() -> None:
    assert new_damage([_damage(0, 0, 0), ConfigError("something else")], []) == []


def test_more_damage_than_the_limit_is_an_error_that_names_the_last() -> None:
    known = [(0, 0, number) for number in range(64)]
    with pytest.raises(DataError, match=r"(?s)more than 64 blocks are damaged.*s-000007\.tar, block 5"):
        extend(known, [_damage(0, 7, 5)], limit=64)
