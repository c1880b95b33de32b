"""Learning rate shapes, and the division of a global batch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.config import OptimSection, ScheduleSection
from dist_lm.errors import ConfigError
from dist_lm.schedule import BatchPlan, learning_rate

pytestmark = pytest.mark.fast

STEPS = 100
PEAK = 0.002
KINDS = ["constant", "linear", "cosine", "wsd"]


def rates(**schedule: Any) -> list[float]:
    """The learning rate of step 1, 2, ... STEPS; index 0 is step 1."""
    optim = OptimSection(lr=PEAK, schedule=ScheduleSection(**schedule))
    return [learning_rate(optim, step=step, steps=STEPS) for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("kind", KINDS)
def test_warmup_rises_linearly_from_nothing_and_reaches_the_peak(kind: str) -> None:
    warm = rates(kind=kind, warmup_steps=10)[:10]
    assert warm == pytest.approx([PEAK * step / 10 for step in range(1, 11)])


@pytest.mark.parametrize("kind", KINDS)
def test_without_warmup_the_first_step_has_the_peak(kind: str) -> None:
    assert rates(kind=kind)[0] == pytest.approx(PEAK)


@pytest.mark.parametrize("kind", KINDS)
def test_after_warmup_the_rate_never_rises_and_the_last_step_still_moves_weights(kind: str) -> None:
    decay = {"decay_steps": 20} if kind == "wsd" else {}
    after = rates(kind=kind, warmup_steps=10, **decay)[9:]
    assert all(later <= earlier for earlier, later in itertools.pairwise(after))
    assert after[-1] > 0


def test_constant_stays_at_the_peak() -> None:
    assert rates(kind="constant", warmup_steps=10, final_share=0.5)[10:] == [PEAK] * 90


def test_linear_falls_by_the_same_amount_each_step_to_the_final_share_one_step_after_the_end() -> None:
    after = rates(kind="linear", warmup_steps=20, final_share=0.1)[20:]
    falls = [earlier - later for earlier, later in itertools.pairwise(after)]
    assert falls == pytest.approx([0.9 * PEAK / 80] * 79)
    assert after[-1] - falls[0] == pytest.approx(0.1 * PEAK)


def test_cosine_is_half_way_in_the_middle_and_flat_at_both_ends() -> None:
    values = rates(kind="cosine")
    assert values[50] == pytest.approx(PEAK / 2)
    assert values[0] - values[1] < 0.1 * (values[50] - values[51])
    assert values[-2] - values[-1] < 0.1 * (values[50] - values[51])
    expected = [0.5 * PEAK * (1 + math.cos(math.pi * step / STEPS)) for step in range(STEPS)]
    assert values == pytest.approx(expected)


def test_wsd_holds_the_peak_and_then_falls_linearly() -> None:
    values = rates(kind="wsd", warmup_steps=10, decay_steps=24, final_share=0.5)
    assert values[9:76] == [PEAK] * 67
    assert values[76:] == pytest.approx([PEAK * (1 - 0.5 * step / 25) for step in range(1, 25)])


def test_a_run_of_warmup_alone_is_possible() -> None:
    assert rates(kind="linear", warmup_steps=STEPS)[-1] == pytest.approx(PEAK)


sizes = st.integers(min_value=1, max_value=5000)
ranks = st.integers(min_value=1, max_value=600)
spare = st.integers(min_value=0, max_value=5000)


@given(world_size=ranks, more_rows=spare, micro_rows=sizes)
def test_a_division_covers_the_batch_in_few_even_micro_batches(
    world_size: int, more_rows: int, micro_rows: int
) -> None:
    global_rows = world_size + more_rows
    plan = BatchPlan.divide(global_rows, micro_rows, world_size)
    room = plan.rows_per_micro * plan.micro_steps
    assert 1 <= plan.rows_per_micro <= micro_rows
    assert room * world_size >= global_rows
    # Fewest micro-batches: with one less they would be larger than allowed.
    assert (plan.micro_steps - 1) * micro_rows < plan.rows_per_rank
    # Even: a row less in each micro-batch would be too few.
    assert (plan.rows_per_micro - 1) * plan.micro_steps < plan.rows_per_rank <= room
    # No rank is fuller than it must be.
    assert (plan.rows_per_rank - 1) * world_size < global_rows <= plan.rows_per_rank * world_size


@given(global_rows=ranks, more_ranks=ranks, micro_rows=sizes)
def test_fewer_rows_than_ranks_are_refused_with_the_number_to_set(
    global_rows: int, more_ranks: int, micro_rows: int
) -> None:
    world_size = global_rows + more_ranks
    with pytest.raises(ConfigError) as caught:
        BatchPlan.divide(global_rows, micro_rows, world_size)
    assert caught.value.where == "batch.global"
    assert f"batch.global to {world_size} or more" in caught.value.do


def test_a_round_division_has_no_empty_places() -> None:
    plan = BatchPlan.divide(64, 8, 2)
    assert (plan.rows_per_rank, plan.micro_steps, plan.rows_per_micro) == (32, 4, 8)
