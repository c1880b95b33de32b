"""The scaling model beside published points: its constant is the best one, and its errors are those it states."""

from __future__ import annotations

import pytest

from dist_lm.plan.published import Comparison, comparisons, root_mean_square
from dist_lm.plan.traffic import LATENCY_S

pytestmark = pytest.mark.fast


def points(fitted: bool, latency_s: float = LATENCY_S) -> list[Comparison]:
    return [each for each in comparisons(latency_s) if each.fitted is fitted]


@pytest.mark.parametrize("other_s", [0.0, LATENCY_S - 2e-7, LATENCY_S + 2e-7])
def test_no_other_latency_fits_better(other_s: float) -> None:
    assert root_mean_square(points(True)) < root_mean_square(points(True, other_s))


def test_points_that_were_not_fitted_are_met_as_well() -> None:
    assert len(points(True)) == 12
    assert root_mean_square(points(True)) < 0.016
    assert root_mean_square(points(False)) < 0.02
    assert max(abs(each.error) for each in comparisons()) < 0.04


def test_the_first_point_of_a_series_is_met_exactly_and_more_gpus_are_never_faster_each() -> None:
    by_series: dict[str, list[float]] = {}
    for each in comparisons(latency_s=1e-5):
        by_series.setdefault(each.series, [1.0]).append(each.predicted)
    assert all(shares == sorted(shares, reverse=True) for shares in by_series.values())
