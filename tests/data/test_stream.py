"""The stream: the same global batches for any number of ranks, from any position, through any fault."""

from __future__ import annotations

import os
import shutil
import threading
import tracemalloc
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_datasets import TextDataset, flip_bit, write_pairs

from dist_lm.config import SourceSpec
from dist_lm.data.eras import Eras
from dist_lm.data.handover import READ_AHEAD
from dist_lm.data.order import Order, partner_rows
from dist_lm.data.shards import ShardReader
from dist_lm.data.stream import Rows, StepRows, Stream
from dist_lm.data.training_set import TrainingSet
from dist_lm.data.verify import verify_dataset
from dist_lm.data.views import view_of
from dist_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.fast

SHARDS = [200, 33, 1, 150, 129]
ROWS = sum(SHARDS)
LANES, ERA, SEED = 12, 24, 5
PARTNER_COLUMNS = ("second", "second_length", "document")
RANKS = [1, 2, 3, 4, 6, 8]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return write_pairs(tmp_path_factory.mktemp("stream"), SHARDS, block_rows=16)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def training_set(dataset: TextDataset, **changes: int) -> TrainingSet:
    return TrainingSet([SourceSpec(path=str(dataset.folder))], **{"seed": SEED, "lanes": LANES, "era": ERA, **changes})


def open_stream(dataset: TextDataset, **changes: Any) -> Stream:
    order = {name: changes.pop(name) for name in ("seed", "lanes", "era") if name in changes}
    return Stream(training_set(dataset, **order), **{"global_rows": 32, "rank": 0, "world_size": 1, **changes})


def steps_of(dataset: TextDataset, num_steps: int, **changes: Any) -> list[StepRows]:
    with open_stream(dataset, **changes) as stream:
        return list(islice(stream, num_steps))


def global_batches(
    dataset: TextDataset, num_steps: int, world_size: int, *, global_rows: int = 32, **changes: Any
) -> list[Rows]:
    """What all ranks together train on: slot i of a batch is row i // world_size of rank i % world_size."""
    parts = [
        steps_of(dataset, num_steps, rank=rank, world_size=world_size, global_rows=global_rows, **changes)
        for rank in range(world_size)
    ]
    batches = []
    for of_ranks in zip(*parts, strict=True):
        assert len({(step.position, step.next_position, len(step.rows)) for step in of_ranks}) == 1
        slots = [(slot % world_size, slot // world_size) for slot in range(global_rows)]
        rows = [of_ranks[rank].rows.take(slice(row, row + 1)) for rank, row in slots]
        assert all(row.real[0] for row in rows)
        assert sum(int(step.rows.real.sum()) for step in of_ranks) == global_rows
        batches.append(
            Rows(
                {name: np.concatenate([row.columns[name] for row in rows]) for name in rows[0].columns},
                *(np.concatenate([getattr(row, name) for row in rows]) for name in ("sample_id", "epoch", "real")),
            )
        )
    return batches


def ids(batches: list[Rows]) -> list[list[tuple[int, int]]]:
    return [list(zip(b.epoch.tolist(), b.sample_id.tolist(), strict=True)) for b in batches]


def assert_equal_rows(one: Rows, two: Rows) -> None:
    assert ids([one]) == ids([two])
    assert one.columns.keys() == two.columns.keys()
    for name, array in one.columns.items():
        assert np.array_equal(array, two.columns[name]), name


# ---------------------------------------------------------------------------- which rows come


def test_rows_carry_the_content_and_the_identity_that_the_order_names(dataset: TextDataset) -> None:
    order = Order(SHARDS, seed=SEED, lanes=LANES, era=ERA)
    starts = np.concatenate([[0], np.cumsum(SHARDS)])
    for step in steps_of(dataset, 40):
        located = order.locate(np.arange(step.position, step.next_position))
        assert np.array_equal(step.rows.sample_id, starts[located.shard] + located.row)
        assert np.array_equal(step.rows.epoch, located.epoch)
        for name, whole in dataset.columns.items():
            assert np.array_equal(step.rows.columns[name], whole[step.rows.sample_id.astype(np.int64)])
            assert step.rows.columns[name].dtype == whole.dtype


def test_two_epochs_show_every_row_twice_and_in_another_order(dataset: TextDataset) -> None:
    seen = [pair for batch in ids(global_batches(dataset, 2 * ROWS // 27, 1, global_rows=27)) for pair in batch]
    assert ROWS % 27 == 0
    assert sorted(seen) == [(epoch, row) for epoch in (0, 1) for row in range(ROWS)]
    assert [row for _, row in seen[:ROWS]] != [row for _, row in seen[ROWS:]]


@pytest.mark.parametrize(("global_rows", "lanes", "position"), [(32, 7, 0), (24, 12, 5), (50, 8, 31)])
def test_any_number_of_ranks_sees_the_same_global_batches(
    dataset: TextDataset, global_rows: int, lanes: int, position: int
) -> None:
    num_steps = ROWS // global_rows + 4
    facts: dict[str, Any] = {"global_rows": global_rows, "lanes": lanes, "position": position}
    facts |= {"partner_columns": PARTNER_COLUMNS}
    alone = global_batches(dataset, num_steps, 1, **facts)
    assert {int(epoch) for batch in alone for epoch in batch.epoch} == {0, 1}
    for world_size in RANKS[1:]:
        for one, many in zip(alone, global_batches(dataset, num_steps, world_size, **facts), strict=True):
            assert_equal_rows(one, many)


@pytest.mark.parametrize(("world_size", "real"), [(3, [11, 11, 10]), (6, [6, 6, 5, 5, 5, 5])])
def test_ranks_that_do_not_divide_the_batch_are_filled_up_with_rows_that_are_not_real(
    dataset: TextDataset, world_size: int, real: list[int]
) -> None:
    for rank, expected in enumerate(real):
        for step in steps_of(dataset, 5, rank=rank, world_size=world_size):
            assert len(step.rows) == max(real)
            assert step.rows.real.tolist() == [True] * expected + [False] * (max(real) - expected)
            fillers = step.rows.take(~step.rows.real)
            # A task may compute on fillers: they are sound rows.
            for name, whole in dataset.columns.items():
                assert np.array_equal(fillers.columns[name], whole[fillers.sample_id.astype(np.int64)])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_run_goes_on_from_any_batch_with_any_number_of_ranks(dataset: TextDataset, data: st.DataObject) -> None:
    whole = _uninterrupted(dataset)
    begin = data.draw(st.integers(0, len(whole) - 3), label="batch to go on from")
    world_size = data.draw(st.sampled_from(RANKS), label="ranks")
    facts: dict[str, Any] = {"position": begin * 32, "partner_columns": PARTNER_COLUMNS}
    resumed = global_batches(dataset, 3, world_size, **facts)
    for one, two in zip(whole[begin : begin + 3], resumed, strict=True):
        assert_equal_rows(one, two)


_WHOLE: dict[Path, list[Rows]] = {}


def _uninterrupted(dataset: TextDataset) -> list[Rows]:
    if dataset.folder not in _WHOLE:
        _WHOLE[dataset.folder] = global_batches(dataset, 40, 1, partner_columns=PARTNER_COLUMNS)
    return _WHOLE[dataset.folder]


@pytest.mark.parametrize("world_size", RANKS)
@pytest.mark.parametrize("before_end", [-1, 0, 1])
def test_a_run_goes_on_across_the_end_of_an_epoch(dataset: TextDataset, world_size: int, before_end: int) -> None:
    """513 rows in batches of 32: batch 16 holds the last row of the epoch and 31 of the next."""
    begin = ROWS // 32 - before_end
    expected = _uninterrupted(dataset)[begin : begin + 3]
    resumed = global_batches(dataset, 3, world_size, position=begin * 32, partner_columns=PARTNER_COLUMNS)
    for one, two in zip(expected, resumed, strict=True):
        assert_equal_rows(one, two)


def test_another_global_batch_goes_on_with_the_next_row(dataset: TextDataset) -> None:
    before = ids(global_batches(dataset, 5, 2, global_rows=32))
    after = ids(global_batches(dataset, 4, 3, global_rows=50, position=5 * 32))
    rows = [row for batch in [*before, *after] for row in batch]
    assert rows == [row for batch in ids(_uninterrupted(dataset)) for row in batch][: len(rows)]


@pytest.mark.parametrize(("lanes", "era"), [(1, 1), (2, 5), (64, 3), (ROWS, 4), (3, 10_000)])
def test_a_batch_may_span_many_eras_of_a_lane(dataset: TextDataset, lanes: int, era: int) -> None:
    alone = global_batches(dataset, 4, 1, lanes=lanes, era=era, global_rows=400)
    seen = [row for batch in ids(alone) for row in batch]
    assert sorted(seen[:ROWS]) == [(0, row) for row in range(ROWS)]
    for one, many in zip(alone, global_batches(dataset, 4, 3, lanes=lanes, era=era, global_rows=400), strict=True):
        assert_equal_rows(one, many)


def test_a_batch_as_large_as_the_data_set_holds_every_row_once(dataset: TextDataset) -> None:
    for epoch, batch in enumerate(ids(global_batches(dataset, 3, 2, global_rows=ROWS))):
        assert sorted(batch) == [(epoch, row) for row in range(ROWS)]


# --------------------------------------------------------------------------------- partners


def _block(sample_id: int) -> tuple[int, int, int]:
    """First row and size of a row's block, and the row's place in it."""
    start = 0
    for rows in SHARDS:
        if sample_id < start + rows:
            place = sample_id - start
            first = place // 16 * 16
            return start + first, min(16, rows - first), place - first
        start += rows
    raise AssertionError(sample_id)


def test_a_partner_is_another_row_of_the_same_block(dataset: TextDataset) -> None:
    alone = 0
    for batch in _uninterrupted(dataset):
        for at, sample_id in enumerate(batch.sample_id.tolist()):
            first, rows, row = _block(sample_id)
            partner = first + int(partner_rows(row, rows, seed=SEED, epoch=int(batch.epoch[at]), sample_id=sample_id))
            assert (partner != sample_id) == (rows > 1)
            alone += rows == 1
            for name in PARTNER_COLUMNS:
                assert np.array_equal(batch.columns[f"partner_{name}"][at], dataset.columns[name][partner])
    # The data set has blocks of one row: the shard of one row, and the last rows of 33 and 129.
    assert alone > 3


def test_a_column_that_is_not_there_has_no_partner(dataset: TextDataset) -> None:
    with pytest.raises(DataError, match="no column 'label'"):
        open_stream(dataset, partner_columns=("label",))


# ------------------------------------------------------------------------- what is refused


def test_a_data_set_smaller_than_a_global_batch_is_refused(dataset: TextDataset) -> None:
    with pytest.raises(
        DataError, match=rf"(?s)global batch of {ROWS + 1} rows.*It has {ROWS} rows; a batch takes {ROWS + 1}"
    ):
        open_stream(dataset, global_rows=ROWS + 1)


@pytest.mark.parametrize(
    "changes",
    [{"world_size": 33}, {"rank": 1}, {"rank": -1}, {"world_size": 0}, {"rank": 4, "world_size": 4}],
)
def test_impossible_ranks_are_configuration_errors(dataset: TextDataset, changes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        open_stream(dataset, **changes)


def test_a_negative_position_and_too_many_lanes_are_refused(dataset: TextDataset) -> None:
    with pytest.raises(DataError, match="position -32 is negative"):
        open_stream(dataset, position=-32)
    with pytest.raises(DataError, match="lanes"):
        open_stream(dataset, lanes=ROWS + 1)


def test_the_fingerprint_tells_what_a_position_counts_in(dataset: TextDataset, tmp_path: Path) -> None:
    other_data = write_pairs(tmp_path, SHARDS, block_rows=8)
    reference = training_set(dataset).fingerprint()
    assert training_set(dataset).fingerprint(64) == reference
    different = [{"seed": 6}, {"lanes": 8}, {"era": 25}]
    fingerprints = {training_set(dataset, **changes).fingerprint() for changes in different}
    assert len(fingerprints | {reference, training_set(other_data).fingerprint()}) == 5


# ------------------------------------------------------------------------ faults and the end


def test_damage_met_by_the_reader_thread_reaches_the_consumer(dataset: TextDataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "victim")
    victim = TextDataset(tmp_path / "victim", dataset.manifest, dataset.columns)
    flip_bit(victim.tar(1), victim.offsets(1)[1] + 520)
    with open_stream(victim, lanes=1, era=8, global_rows=8) as stream:
        before = []
        with pytest.raises(DataError, match=r"s-000001\.tar, block 1\)"):
            before.extend(stream)
        # What was read before the damage was right, and the error stays.
        assert 0 < len(before) < ROWS // 8
        expected = ids(global_batches(dataset, len(before), 1, lanes=1, era=8, global_rows=8))
        assert ids([step.rows for step in before]) == expected
        with pytest.raises(DataError, match=r"s-000001\.tar"):
            next(stream)


def test_a_shard_that_is_gone_reaches_the_consumer(dataset: TextDataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.folder, tmp_path / "victim")
    victim = TextDataset(tmp_path / "victim", dataset.manifest, dataset.columns)
    victim.tar(3).unlink()
    with open_stream(victim) as stream, pytest.raises(DataError, match=r"s-000003\.tar"):
        list(stream)


def test_close_ends_a_reader_that_waits_for_room(dataset: TextDataset) -> None:
    stream = open_stream(dataset)
    next(stream)
    assert any(thread.name == "dist_lm-reader-0" for thread in threading.enumerate())
    stream.close()
    stream.close()
    assert not any(thread.name == "dist_lm-reader-0" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_a_stream_that_was_never_read_has_no_thread(dataset: TextDataset) -> None:
    stream = open_stream(dataset)
    stream.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_close_wakes_a_consumer_that_waits_for_a_stuck_reader(dataset: TextDataset, tmp_path: Path) -> None:
    """A named pipe in the place of an index: whoever reads it waits until the writer lets go."""
    shutil.copytree(dataset.folder, tmp_path / "victim")
    victim = TextDataset(tmp_path / "victim", dataset.manifest, dataset.columns)
    first_read = Order(SHARDS, seed=SEED, lanes=1, era=8).era_ranges(0, 0, 0)[0].shard
    pipe = victim.index(first_read)
    pipe.unlink()
    os.mkfifo(pipe)
    stream = open_stream(victim, lanes=1, era=8)
    outcome: list[str] = []

    def consume() -> None:
        try:
            next(stream)
        except RuntimeError as error:
            outcome.append(str(error))

    consumer, closer = threading.Thread(target=consume), threading.Thread(target=stream.close)
    consumer.start()
    # Opening for writing returns once the reader has opened the other end.
    writer = os.open(pipe, os.O_WRONLY)
    closer.start()
    consumer.join()
    assert outcome == ["the stream is closed"]
    os.close(writer)
    closer.join()


def test_the_reader_does_not_run_ahead_of_its_queue(dataset: TextDataset, tmp_path: Path) -> None:
    """Each batch is an era with a file of its own to open; so files that go missing stop it soon."""
    shutil.copytree(dataset.folder, tmp_path / "victim")
    with open_stream(TextDataset(tmp_path / "victim", dataset.manifest, {}), lanes=1, era=8, global_rows=8) as stream:
        next(stream)
        # Time enough for a reader without limit to read the whole data set.
        verify_dataset(dataset.folder)
        for path in (tmp_path / "victim").glob("*.tar"):
            path.unlink()
        after = []
        with pytest.raises(DataError, match="missing"):
            after.extend(stream)
    # Those that wait, and the one that is being made.
    assert len(after) <= READ_AHEAD + 1


def test_the_lanes_are_read_in_sequence_and_each_era_once(dataset: TextDataset) -> None:
    opened: list[str] = []

    def opener(location: str, *, size: int | None) -> Any:
        opened.append(Path(location).name)
        return open(location, "rb")

    reader = ShardReader(dataset.folder, dataset.manifest, opener=opener)
    order = Order(SHARDS, seed=SEED, lanes=LANES, era=ERA)
    eras = Eras(order, view_of(dataset.manifest, None), reader, range(LANES))
    for position in range(0, ROWS, 27):
        eras.read_into(eras.empty_rows(27), np.arange(27), np.arange(position, position + 27))
    place = order.place(np.arange(ROWS))
    needed = {(int(lane), int(era)) for lane, era in zip(place.lane, place.era, strict=True)}
    expected = sum(len(order.era_ranges(0, lane, era)) for lane, era in needed)
    assert sum(name.endswith(".tar") for name in opened) == expected
    assert sum(name.endswith(".idx") for name in opened) == len(SHARDS)


def _memory_of(dataset: TextDataset, world_size: int) -> int:
    facts = {"lanes": 8, "partner_columns": PARTNER_COLUMNS, "world_size": world_size}
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        stream = open_stream(dataset, **facts)
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    stream.close()
    return after - before


@pytest.mark.parametrize(("world_size", "own_lanes"), [(2, 4), (4, 2), (8, 1), (6, 4)])
def test_a_rank_holds_the_eras_of_its_own_lanes_and_no_more(
    dataset: TextDataset, world_size: int, own_lanes: int
) -> None:
    one_lane = (ERA + 2 * 16) * (dataset.manifest.row_bytes + 24)
    _memory_of(dataset, 1)  # What is allocated once for all, such as modules, is allocated now.
    spared = _memory_of(dataset, 1) - _memory_of(dataset, world_size)
    assert 0.8 * one_lane < spared / (8 - own_lanes) <= one_lane
