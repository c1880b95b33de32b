"""Streams of remote data sets: the same rows as from this machine, each shard fetched once and ahead of its use."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from http_server import Fault, FaultyServer, serving
from text_datasets import TextDataset, write_pairs, write_tokens

from dist_lm.config import SourceSpec
from dist_lm.data.cache import FOLDER, ShardCache
from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.order import Order
from dist_lm.data.readahead import Fetcher, ReadAhead
from dist_lm.data.shards import ShardReader
from dist_lm.data.stream import Rows, Stream
from dist_lm.data.training_set import TrainingSet
from dist_lm.errors import DataError

SHARDS = [200, 33, 64, 150, 129]
ROWS = sum(SHARDS)
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return write_pairs(tmp_path_factory.mktemp("origin") / "data", SHARDS)


@pytest.fixture
def server(dataset: TextDataset) -> Iterator[FaultyServer]:
    with serving(dataset.folder.parent) as running:
        yield running


def rows_of(location: str, steps: int, *, lanes: int = 4, era: int = 24, **facts: Any) -> list[Rows]:
    data = TrainingSet([SourceSpec(path=location)], seed=5, lanes=lanes, era=era)
    facts = {"rank": 0, "world_size": 1, "global_rows": 32, **facts}
    with Stream(data, partner_columns=("second",), **facts) as stream:
        return [step.rows for step in islice(stream, steps)]


def assert_equal(left: list[Rows], right: list[Rows]) -> None:
    assert len(left) == len(right)
    for one, two in zip(left, right, strict=True):
        assert np.array_equal(one.sample_id, two.sample_id)
        for name, array in one.columns.items():
            assert np.array_equal(array, two.columns[name]), name


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("limit_bytes", [None, MEGABYTE, 60_000])
def test_a_remote_stream_has_the_rows_of_the_local_one(
    dataset: TextDataset, server: FaultyServer, tmp_path: Path, limit_bytes: int | None, rank: int
) -> None:
    server.faults = [Fault("reset", path=".tar"), Fault("status", path=".tar", status=503), Fault("short", path=".tar")]
    cache = ShardCache(tmp_path, limit_bytes) if limit_bytes else None
    part = {"rank": rank, "world_size": 2, "position": 96}
    remote = rows_of(f"{server.url}/data", 2 * ROWS // 32, cache=cache, **part)
    assert_equal(remote, rows_of(str(dataset.folder), 2 * ROWS // 32, **part))
    assert {kind: server.fired[kind] for kind in ("reset", "status", "short")} == {"reset": 1, "status": 1, "short": 1}
    if limit_bytes:
        # Nothing is left of the threads that fetch ahead.
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("dist_lm")]
        files = [path for path in (tmp_path / FOLDER).iterdir() if path.is_file()]
        assert 0 < sum(path.stat().st_size for path in files) <= limit_bytes


@pytest.mark.parametrize("cached", [False, True])
def test_a_remote_stream_of_tokens_has_the_rows_of_the_local_one(tmp_path: Path, cached: bool) -> None:
    local = write_tokens(tmp_path / "origin" / "data", [1000, 640], block_tokens=64)
    cache = ShardCache(tmp_path / "cache", MEGABYTE) if cached else None

    def rows(location: str, cache: ShardCache | None) -> list[Rows]:
        data = TrainingSet([SourceSpec(path=location)], seed=5, lanes=4, era=24, seq_len=8)
        with Stream(data, global_rows=32, rank=0, world_size=1, cache=cache) as stream:
            return [step.rows for step in islice(stream, 13)]

    with serving(tmp_path / "origin") as server:
        assert_equal(rows(f"{server.url}/data", cache), rows(str(local.folder), None))


def test_two_epochs_download_each_shard_once(dataset: TextDataset, server: FaultyServer, tmp_path: Path) -> None:
    rows_of(f"{server.url}/data", 2 * ROWS // 32, cache=ShardCache(tmp_path, MEGABYTE))
    assert [len(server.bodies_of(entry.name)) for entry in dataset.manifest.shards] == [1] * 5


def test_the_held_out_rows_come_from_the_cache(dataset: TextDataset, server: FaultyServer, tmp_path: Path) -> None:
    facts: dict[str, Any] = {"rank": 0, "world_size": 1, "micro_rows": 64}
    rows = HeldoutRows(f"{server.url}/data", cache=ShardCache(tmp_path, MEGABYTE), **facts)
    local = list(HeldoutRows(dataset.folder, **facts))
    assert_equal(list(rows), local)
    assert_equal(list(rows), local)
    assert [len(server.bodies_of(entry.name)) for entry in dataset.manifest.shards] == [1] * 5


def test_damage_met_ahead_of_time_is_told_when_it_is_needed(
    dataset: TextDataset, server: FaultyServer, tmp_path: Path
) -> None:
    read = Order(SHARDS, seed=5, lanes=1, era=24).locate(np.arange(ROWS)).shard.tolist()
    bad = list(dict.fromkeys(read))[2]
    server.faults = [Fault("flip", path=f"{bad}.tar", at=530, times=99)]
    data = TrainingSet([SourceSpec(path=f"{server.url}/data")], seed=5, lanes=1, era=24)
    seen: list[int] = []
    cache = ShardCache(tmp_path, MEGABYTE)
    with Stream(data, global_rows=8, rank=0, world_size=1, cache=cache) as stream:
        with pytest.raises(DataError, match=rf"s-00000{bad}\.tar, block 0\)"):
            seen.extend(step.next_position for step in stream)
        # Every batch before the shard's first era was right; that era begins at most one era early.
        assert read.index(bad) - 24 - 8 < seen[-1] <= read.index(bad)


# --------------------------------------------------------------------------------- the plan


class Now(Fetcher):
    """Does at once what it is given."""

    def add(self, work: Callable[[], None]) -> None:
        work()


def planned(server: FaultyServer, folder: Path, *, lanes: int, limit_bytes: int = MEGABYTE) -> tuple[ReadAhead, Order]:
    data = TrainingSet([SourceSpec(path=f"{server.url}/data")], seed=5, lanes=lanes, era=24)
    source = data.sources[0]
    cache = ShardCache(folder, limit_bytes)
    reader = ShardReader(source.location, source.view.manifest, cache=cache)
    ahead = ReadAhead(source.order, reader, Now())
    cache.next_use = ahead.next_use
    return ahead, source.order


def cached(folder: Path) -> set[int]:
    return {int(path.name[-10:-4]) for path in (folder / FOLDER).glob("*.tar")}


def test_the_shards_of_an_era_and_the_next_one_are_fetched_ahead(server: FaultyServer, tmp_path: Path) -> None:
    ahead, order = planned(server, tmp_path, lanes=1)
    shards = order.locate(np.arange(ROWS)).shard
    first, second = list(dict.fromkeys(shards.tolist()))[:2]
    ahead.before(np.array([0]))
    assert cached(tmp_path) == {first, second}
    # Nothing more before the next shard is begun.
    ahead.before(np.array([24]))
    assert cached(tmp_path) == {first, second}
    ahead.before(np.array([int(np.argmax(shards == second))]))
    assert len(cached(tmp_path)) == 3


def test_nothing_is_fetched_ahead_that_pushes_out_what_is_needed_sooner(
    dataset: TextDataset, server: FaultyServer, tmp_path: Path
) -> None:
    sizes = sorted(entry.bytes for entry in dataset.manifest.shards)
    ahead, order = planned(server, tmp_path, lanes=1, limit_bytes=sizes[0] + sizes[1] - 1)
    first = int(order.locate(np.array([0])).shard[0])
    ahead.before(np.array([0]))
    assert cached(tmp_path) <= {first}


@pytest.mark.parametrize("lanes", [1, 3, 12])
@pytest.mark.parametrize("position", [0, 100, ROWS - 10, 5 * ROWS + 333])
def test_the_next_use_of_a_shard_is_where_the_order_reads_it(
    server: FaultyServer, tmp_path: Path, lanes: int, position: int
) -> None:
    ahead, order = planned(server, tmp_path, lanes=lanes)
    ahead.before(np.array([position]))
    positions = np.arange(position, position + 3 * ROWS)
    located, place = order.locate(positions), order.place(positions)
    # An era is read as a whole when its first position comes.
    era = {}
    first_use: dict[int, int] = {}
    for at, shard, key in zip(
        positions.tolist(), located.shard.tolist(), zip(place.epoch, place.lane, place.era, strict=True), strict=True
    ):
        first_use[shard] = min(first_use.get(shard, at), era.setdefault(tuple(map(int, key)), at))
    names = {int(name[-10:-4]): use for name, use in ahead.next_use().items()}
    assert names == {shard: at - position for shard, at in first_use.items()}
