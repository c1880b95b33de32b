"""Goodput: the simulation by hand, the formulas against the simulation."""

from __future__ import annotations

import itertools
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.plan.goodput import Costs, best_interval_s, expected, faults_at, simulate

pytestmark = pytest.mark.fast
FREE = Costs(stall_s=0, write_s=0, restart_s=0)


def test_without_faults_only_the_stalls_are_lost() -> None:
    # Ten intervals, nine checkpoints between them.
    assert simulate([], Costs(2, 5, 50), 10, 100) == pytest.approx(100 / 118)


@pytest.mark.parametrize(
    ("faults", "lost"),
    [
        # In the first interval: all of it is done again.
        ([7.0], 7 + 50),
        # The checkpoint at 10 s stalls until 12 s, and counts from 17 s on.
        ([16.0], 16 + 50),
        ([18.0], 18 - 12 + 50),
        # During the stall.
        ([11.0], 11 + 50),
        # Another fault during the restart.
        ([7.0, 30.0], 30 + 50),
    ],
)
def test_a_fault_costs_what_was_not_yet_written_and_a_restart(faults: list[float], lost: float) -> None:
    costs = Costs(stall_s=2, write_s=5, restart_s=50)
    # What is done again after 12 s stalls as before: the stall of a lost checkpoint is paid twice.
    stalls = 9 * 2
    assert 100 / simulate(faults, costs, 10, 100) == pytest.approx(100 + stalls + lost)


@given(st.floats(1, 1e4), st.floats(1e4, 1e7), st.floats(0, 100))
def test_no_other_interval_is_better_than_the_best_one(stall_s: float, mtbf_s: float, restart_s: float) -> None:
    costs = Costs(stall_s, 0, restart_s)
    best = best_interval_s(costs, mtbf_s)
    for factor in (0.25, 4.0):
        assert expected(costs, mtbf_s, best) >= expected(costs, mtbf_s, best * factor) - 0.02


def test_the_formula_agrees_with_many_simulated_runs() -> None:
    costs, mtbf_s = Costs(stall_s=5, write_s=60, restart_s=120), 20_000.0
    interval_s = best_interval_s(costs, mtbf_s)
    found = [simulate(faults_at(seed, mtbf_s), costs, interval_s, 50 * mtbf_s) for seed in range(40)]
    assert statistics.mean(found) == pytest.approx(expected(costs, mtbf_s, interval_s), abs=0.005)


def test_random_faults_follow_from_the_seed_and_come_at_their_rate() -> None:
    first = list(itertools.islice(faults_at(3, 10.0), 5000))
    assert first == list(itertools.islice(faults_at(3, 10.0), 5000))
    assert first[-1] / 5000 == pytest.approx(10.0, rel=0.05)


def test_more_faults_never_help() -> None:
    costs = Costs(1, 2, 30)
    shares = [simulate(faults_at(1, mtbf_s), costs, 50, 5000) for mtbf_s in (200, 2000, 2e5)]
    assert shares == sorted(shares)
    assert simulate([], FREE, 10, 100) == 1.0
