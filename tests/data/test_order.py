"""The order of the data: golden vectors, and the properties that training relies on."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from dist_lm.data.order import Order, keyed_hash, mix64, partner_rows, permute
from dist_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.fast

SHARD_ROWS = [1000, 1, 7, 513, 250]


@st.composite
def orders(draw: st.DrawFn) -> tuple[list[int], Order]:
    shard_rows = draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    lanes = draw(st.integers(1, min(sum(shard_rows), 9)))
    seed, era = draw(st.integers(0, 2**64 - 1)), draw(st.integers(1, 40))
    return shard_rows, Order(shard_rows, seed=seed, lanes=lanes, era=era)


def row_ids(order: Order, shard_rows: list[int], positions: NDArray[np.int64]) -> NDArray[np.int64]:
    """One number a row: its place with the shards laid end to end."""
    located = order.locate(positions)
    return np.concatenate([[0], np.cumsum(shard_rows)])[located.shard] + located.row


def test_mix64_gives_the_published_numbers_of_splitmix64() -> None:
    golden = 0x9E3779B97F4A7C15
    states = [(1234567 + step * golden) % 2**64 for step in range(5)]
    assert mix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert int(mix64(0)) == 0xE220A8397B1DCDAF


def test_golden_vectors_of_keyed_hash() -> None:
    assert int(keyed_hash()) == 2611923443488327891
    assert int(keyed_hash(0)) == 233067058864325002
    assert int(keyed_hash(1, 2)) == 16424394857094944517
    assert int(keyed_hash(2**64 - 1, 7, 0)) == 7247651143620624010
    assert keyed_hash(5, np.arange(3)).tolist() == [int(keyed_hash(5, i)) for i in range(3)]


def test_golden_vectors_of_permute() -> None:
    assert permute(np.arange(10), 10, 1).tolist() == [9, 8, 7, 1, 5, 3, 2, 6, 4, 0]
    assert permute(np.arange(7), 7, 2**64 - 1).tolist() == [1, 3, 6, 0, 5, 2, 4]
    assert permute([0, 1, 999_999_999], 10**9, 42).tolist() == [627282216, 948616729, 521701261]


def test_golden_vectors_of_locate() -> None:
    # If these change, so must ORDER_VERSION: runs under way would go on in another order.
    order = Order([50, 3, 41], seed=11, lanes=4, era=8)
    located = order.locate([0, 1, 2, 3, 50, 93, 94, 95, 10**12])
    assert located.epoch.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 10638297872]
    assert located.shard.tolist() == [2, 0, 0, 2, 2, 0, 0, 0, 1]
    assert located.row.tolist() == [33, 14, 40, 10, 1, 35, 20, 42, 2]


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_is_one_to_one(n: int, key: int) -> None:
    assert np.array_equal(np.sort(permute(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_permute_of_a_whole_domain_equals_that_of_its_elements(n: int, key: int) -> None:
    # Halves are looked up where one domain is permuted, and computed where each element may have its own.
    assert np.array_equal(permute(np.arange(n), n, key), permute(np.arange(n), np.full(n, n), key))


@given(st.lists(st.tuples(st.integers(1, 2**40), st.integers(0, 2**64 - 1)), min_size=1, max_size=20), st.data())
@settings(max_examples=40, deadline=None)
def test_permute_of_many_domains_at_once_equals_one_at_a_time(
    domains: list[tuple[int, int]], data: st.DataObject
) -> None:
    elements = [data.draw(st.integers(0, n - 1)) for n, _ in domains]
    n, key = (np.array(x, dtype=np.uint64) for x in zip(*domains, strict=True))
    together = permute(elements, n, key)
    assert together.tolist() == [
        int(permute(element, *domain)) for element, domain in zip(elements, domains, strict=True)
    ]


def test_permute_spreads_every_element_evenly() -> None:
    n, trials = 37, 20_000
    keys = keyed_hash(3, np.arange(trials))
    counts = np.bincount(permute(np.full(trials, 5), n, keys), minlength=n)
    expected = trials / n
    # 99.99 % quantile of chi-squared with 36 degrees of freedom is 77; the keys are fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 77


@given(orders())
@settings(max_examples=80, deadline=None)
def test_every_epoch_visits_every_row_once(case: tuple[list[int], Order]) -> None:
    shard_rows, order = case
    n = order.num_rows
    ids = row_ids(order, shard_rows, np.arange(3 * n))
    for epoch in range(3):
        assert np.array_equal(np.sort(ids[epoch * n : (epoch + 1) * n]), np.arange(n))


@pytest.mark.parametrize("seed", range(5))
def test_epochs_and_seeds_have_different_orders(seed: int) -> None:
    order = Order(SHARD_ROWS, seed=seed, lanes=7, era=100)
    n = order.num_rows
    epochs = row_ids(order, SHARD_ROWS, np.arange(3 * n)).reshape(3, n)
    other = row_ids(Order(SHARD_ROWS, seed=seed + 1, lanes=7, era=100), SHARD_ROWS, np.arange(n))
    for one, two in ((epochs[0], epochs[1]), (epochs[1], epochs[2]), (epochs[0], other)):
        # Rows are shuffled among 100 neighbours at least: 1 of 100 may stay where it was.
        assert (one == two).mean() < 0.02


def test_one_shard_meets_other_rows_in_its_eras_in_the_next_epoch() -> None:
    order = Order([4000], seed=0, lanes=4, era=100)
    eras = [{order.era_ranges(epoch, 1, era)[0] for era in range(1, 9)} for epoch in (0, 1)]
    assert not eras[0] & eras[1]


@given(orders(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_position_has_the_same_row_in_whatever_company_it_is_asked_for(
    case: tuple[list[int], Order], data: st.DataObject
) -> None:
    _, order = case
    positions = data.draw(st.lists(st.integers(0, 4 * order.num_rows), min_size=1, max_size=30))
    together = order.locate(positions)
    for at, position in enumerate(positions):
        alone = order.locate([position])
        assert [x[0] for x in alone] == [x[at] for x in together]


@given(orders())
@settings(max_examples=60, deadline=None)
def test_reading_era_by_era_gives_the_rows_that_locate_names(case: tuple[list[int], Order]) -> None:
    _, order = case
    positions = np.arange(2 * order.num_rows)
    place, located = order.place(positions), order.locate(positions)
    for at in range(0, len(positions), 7):
        epoch, lane, era, offset = (int(x[at]) for x in place)
        ranges = order.era_ranges(epoch, lane, era)
        rows = [(shard, row) for shard, lo, hi in ranges for row in range(lo, hi)]
        assert len(rows) <= order.era
        wanted = order.era_permutation(epoch, lane, era)[offset]
        assert rows[wanted] == (located.shard[at], located.row[at])
        assert lane == order.lane_of(positions[at])


@given(orders())
@settings(max_examples=60, deadline=None)
def test_a_lane_never_goes_back_to_an_era_it_has_left(case: tuple[list[int], Order]) -> None:
    _, order = case
    place = order.place(np.arange(2 * order.num_rows))
    for lane in range(order.lanes):
        mine = place.lane == lane
        eras = list(zip(place.epoch[mine], place.era[mine], strict=True))
        assert eras == sorted(eras)


def test_the_lanes_refill_one_at_a_time() -> None:
    order = Order([4000], seed=0, lanes=8, era=64)
    place = order.place(np.arange(order.num_rows))
    begins = np.flatnonzero(place.era[8:] != place.era[:-8]) + 8
    assert len(begins) > 7 * 8
    assert np.diff(begins).min() >= 64 - 8


def test_neighbours_in_the_stream_come_from_all_over_the_data() -> None:
    order = Order([2000] * 5, seed=0, lanes=16, era=100)
    ids = row_ids(order, [2000] * 5, np.arange(10_000)).reshape(-1, 100)
    spread = ids.max(axis=1) - ids.min(axis=1)
    assert spread.min() > 0.8 * 10_000


def test_a_million_positions_over_many_epochs_are_found_together() -> None:
    order = Order([1_000, 234_567], seed=1, lanes=64, era=2048)
    n = order.num_rows
    ids = row_ids(order, [1_000, 234_567], np.arange(n, n + 1_000_000))
    assert np.array_equal(np.sort(ids[:n]), np.arange(n))


@given(
    block_rows=st.integers(2, 300),
    seed=st.integers(0, 2**64 - 1),
    epoch=st.integers(0, 2**40),
    first=st.integers(0, 2**40),
)
@settings(max_examples=60, deadline=None)
def test_a_partner_is_another_row_of_the_block_and_a_function_of_identity(
    block_rows: int, seed: int, epoch: int, first: int
) -> None:
    rows = np.arange(block_rows)
    partners = partner_rows(rows, block_rows, seed=seed, epoch=epoch, sample_id=first + rows)
    assert ((partners >= 0) & (partners < block_rows)).all()
    assert (partners != rows).all()
    for row in (0, block_rows // 2, block_rows - 1):
        assert partners[row] == partner_rows(row, block_rows, seed=seed, epoch=epoch, sample_id=first + row)


def test_partners_change_with_epoch_and_seed_and_reach_every_other_row() -> None:
    rows = np.arange(256)
    by_epoch = [partner_rows(rows, 256, seed=0, epoch=epoch, sample_id=rows) for epoch in range(3000)]
    assert set(np.stack(by_epoch)[:, 9].tolist()) == set(range(256)) - {9}
    other_seed = partner_rows(rows, 256, seed=1, epoch=0, sample_id=rows)
    assert (by_epoch[0] == by_epoch[1]).sum() < 12
    assert (by_epoch[0] == other_seed).sum() < 12


def test_a_row_alone_in_its_block_is_its_own_partner() -> None:
    assert partner_rows(0, 1, seed=3, epoch=1, sample_id=99) == 0


def test_more_lanes_than_rows_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(DataError, match=r"(?s)8 lanes cannot share 5 rows.*data\.lanes to 5"):
        Order([2, 3], seed=0, lanes=8, era=4)


@pytest.mark.parametrize(("seed", "lanes", "era"), [(-1, 1, 1), (2**64, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_impossible_settings_are_configuration_errors(seed: int, lanes: int, era: int) -> None:
    with pytest.raises(ConfigError):
        Order([10], seed=seed, lanes=lanes, era=era)
