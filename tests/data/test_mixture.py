"""The mixture: exact shares, every position of a source once, whatever the stages.  No files."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.data.mixture import BLOCK_ROWS, Mixture, Stage
from dist_lm.errors import ConfigError

pytestmark = pytest.mark.fast

NAMES = ("web", "code", "books")
WEIGHTS = st.tuples(*[st.integers(0, 20)] * 3).filter(lambda weights: all(weights))


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Mixture, list[Stage]]:
    lanes = draw(st.integers(1, 7))
    gaps = draw(st.lists(st.integers(1, 3 * BLOCK_ROWS * lanes), max_size=3))
    starts = np.cumsum([0, *gaps]).tolist()
    stages = [Stage(start, tuple(map(float, draw(WEIGHTS)))) for start in starts]
    return Mixture(NAMES, stages, seed=draw(st.integers(0, 99)), lanes=lanes), stages


@given(WEIGHTS, st.integers(0, 5), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_every_block_of_every_lane_has_the_exact_shares(
    weights: tuple[float, ...], block: int, lanes: int, seed: int
) -> None:
    mixture = Mixture(NAMES, [Stage(0, weights)], seed=seed, lanes=lanes)
    exact = [Fraction(weight) / sum(map(Fraction, weights)) * BLOCK_ROWS for weight in weights]
    counts = mixture.block_counts[0].tolist()
    assert sum(counts) == BLOCK_ROWS
    assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
    raised = [share % 1 for count, share in zip(counts, exact, strict=True) if count > share]
    lowered = [share % 1 for count, share in zip(counts, exact, strict=True) if count < share]
    assert not raised or min(raised) >= max(lowered)
    for lane in range(lanes):
        in_lane = np.arange(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        source = mixture.place(in_lane * lanes + lane).source
        assert np.bincount(source, minlength=3).tolist() == counts


@given(mixtures())
@settings(max_examples=25, deadline=None)
def test_each_lane_reads_its_lane_of_each_source_without_a_gap(drawn: tuple[Mixture, list[Stage]]) -> None:
    """So every position of a source comes once, also where a stage ends inside a block."""
    mixture, stages = drawn
    lanes = mixture.lanes
    placed = mixture.place(np.arange(stages[-1].from_position + 2 * BLOCK_ROWS * lanes + 17))
    lane = np.arange(len(placed.source)) % lanes
    for source in range(3):
        for of in range(lanes):
            read = placed.position[(placed.source == source) & (lane == of)]
            assert np.array_equal(read, np.arange(len(read)) * lanes + of)


@given(mixtures(), st.data())
@settings(max_examples=25, deadline=None)
def test_the_answer_does_not_depend_on_what_was_asked_before(
    drawn: tuple[Mixture, list[Stage]], data: st.DataObject
) -> None:
    mixture, stages = drawn
    end = stages[-1].from_position + 3000
    asked = data.draw(st.lists(st.integers(0, end), min_size=1, max_size=40))
    # In the order of the question, and each alone by a mixture that has answered nothing yet.
    together = mixture.place(np.array(sorted(asked)))
    for place, position in enumerate(sorted(asked)):
        fresh = Mixture(NAMES, stages, seed=mixture.seed, lanes=mixture.lanes).place(np.array([position]))
        assert (fresh.source[0], fresh.position[0]) == (together.source[place], together.position[place])


@given(mixtures(), st.data())
@settings(max_examples=25, deadline=None)
def test_what_was_read_before_a_position_is_what_stands_before_it(
    drawn: tuple[Mixture, list[Stage]], data: st.DataObject
) -> None:
    mixture, stages = drawn
    position = data.draw(st.integers(0, stages[-1].from_position + 5000))
    counts = np.bincount(mixture.place(np.arange(position)).source, minlength=3)
    assert mixture.read_before(position).tolist() == counts.tolist()


GOLDEN_SOURCES = [0, 0, 2, 0, 0, 0, 0, 0, 2, 0, 1, 0, 1, 0, 2]
GOLDEN_POSITIONS = [0, 1, 2, 3, 4, 668, 2867, 2868, 527, 3484, 1025, 3522, 1011, 5487, 24714897]


def test_golden_vectors() -> None:
    """A saved position must lead to the same rows for ever: never adapt these numbers to the code."""
    mixture = Mixture(NAMES, [Stage(0, (0.7, 0.2, 0.1)), Stage(5000, (0.4, 0.4, 0.2))], seed=3, lanes=4)
    assert mixture.block_counts.tolist() == [[717, 205, 102], [410, 409, 205]]
    positions = np.array([0, 1, 2, 3, 4, 1000, 4095, 4096, 4999, 5000, 5001, 5002, 5003, 9999, 123456789])
    placed = mixture.place(positions)
    assert placed.source.tolist() == GOLDEN_SOURCES
    assert placed.position.tolist() == GOLDEN_POSITIONS


def test_a_later_stage_does_not_change_the_fingerprint_of_what_was_read() -> None:
    one = Mixture(NAMES, [Stage(0, (7, 2, 1))], seed=0, lanes=4)
    two = Mixture(NAMES, [Stage(0, (7, 2, 1)), Stage(500, (1, 1, 1))], seed=0, lanes=4)
    for position, same in [(0, True), (1, True), (500, True), (501, False)]:
        assert (one.fingerprint_parts(position) == two.fingerprint_parts(position)) == same


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([(0.0, 0.0, 0.0)], r"(?s)weights of the sources are all 0.*web 0, code 0, books 0"),
        ([(1.0, -0.5, 1.0)], r"(?s)a source has a negative weight.*code -0\.5"),
        ([(1.0, 0.0, 1.0)], r"the source 'code' has weight 0 from beginning to end"),
        ([(1.0, 1.0, 1.0), (0.0, 0.0, 0.0)], "weights of the sources are all 0"),
        ([(1.0, 1.0, 1e-4)], r"(?s)the source 'books' has less than one row in 1024.*never be read"),
    ],
)
def test_weights_that_cannot_be_mixed_are_refused(weights: list[tuple[float, ...]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Mixture(NAMES, [Stage(100 * place, each) for place, each in enumerate(weights)], seed=0, lanes=2)


def test_a_source_may_come_and_go() -> None:
    stages = [Stage(0, (1, 0, 1)), Stage(3000, (0, 1, 0)), Stage(6000, (1, 1, 1))]
    source = Mixture(NAMES, stages, seed=0, lanes=2).place(np.arange(9000)).source
    assert set(source[:3000].tolist()) == {0, 2}
    assert set(source[3000:6000].tolist()) == {1}
    assert set(source[6000:].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("starts", [[1], [0, 0], [0, 50, 40]])
def test_stages_that_do_not_follow_each_other_are_refused(starts: list[int]) -> None:
    with pytest.raises(ConfigError, match="stages of a mixture begin at positions"):
        Mixture(NAMES, [Stage(start, (1, 1, 1)) for start in starts], seed=0, lanes=2)
