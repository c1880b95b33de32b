"""Which items share a row."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data.packing import best_fit

pytestmark = pytest.mark.fast


def test_the_rule_of_packing() -> None:
    assert best_fit({0: 5, 1: 9, 2: 4, 3: 1, 4: 6}, 10) == [[0], [1, 3], [2, 4]]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=80), st.data())
def test_rows_taken_away_leave_the_others_as_they_are(sizes: list[int], data: st.DataObject) -> None:
    rows = best_fit(dict(enumerate(sizes)), 64)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in row) <= 64 for row in rows)
    kept = [row for row in rows if data.draw(st.booleans())]
    assert best_fit({item: sizes[item] for row in kept for item in row}, 64) == kept
