"""Which tokens are masked and what the model sees there, as pure functions of a row's identity.

Enters: token numbers, a key for each row, settings.  Leaves: masks and inputs.
Promises: equal keys give equal masks in any company; each maskable token is a target with the same
probability, whatever the unit; special tokens never are.

Sources: Devlin et al. 2019 (token, word; 80/10/10), Joshi et al. 2020 (SpanBERT: geometric spans).
Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dist_lm.config import MlmTask
from dist_lm.data.order import Hashes, keyed_hash

LONGEST_SPAN = 10
"""Tokens of the longest masked span, as in SpanBERT."""
_REPLACE, _START, _LENGTH = 102, 104, 105
_HALVINGS = 60


def mask_rows(
    ids_BT: NDArray[np.int64],
    maskable_BT: NDArray[np.bool_],
    keys_B: Hashes,
    settings: MlmTask,
    *,
    mask_id: int,
    ordinary_ids: NDArray[np.int64],
    continuation: NDArray[np.bool_],
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which tokens are targets, and the ids that the model sees.

    `ordinary_ids`: what random tokens are drawn from.  `continuation` [vocab]: tokens inside words.
    """
    place_T = np.arange(ids_BT.shape[1], dtype=np.uint64)
    draw_BT = keyed_hash(keys_B[:, None], place_T[None, :])
    # One draw decides a unit: its high bits whether it is a target, its low bits how it is shown.
    unit_BT = draw_BT
    if settings.mask_unit == "span":
        masked_BT, unit_BT = _spans(keys_B, draw_BT, settings)
        masked_BT &= maskable_BT
    else:
        if settings.mask_unit == "word":
            start_BT = ~continuation[ids_BT] | ~maskable_BT
            last_start_BT = np.maximum.accumulate(np.where(start_BT, place_T[None, :], 0), axis=1)
            unit_BT = np.take_along_axis(draw_BT, last_start_BT.astype(np.int64), axis=1)
        masked_BT = maskable_BT & (_unit_interval(unit_BT >> np.uint64(32)) < settings.mask_probability)
    shown = _unit_interval(unit_BT & np.uint64(0xFFFFFFFF))
    # Replacement ids are drawn token by token, also inside a word.
    drawn_BT = (keyed_hash(draw_BT, _REPLACE) % np.uint64(len(ordinary_ids))).astype(np.int64)
    inputs_BT = np.where(masked_BT & (shown < settings.mask_share), mask_id, ids_BT)
    random_BT = masked_BT & (shown >= settings.mask_share)
    random_BT &= shown < settings.mask_share + settings.random_share
    return masked_BT, np.where(random_BT, ordinary_ids[drawn_BT], inputs_BT)


def _spans(keys_B: Hashes, draw_BT: Hashes, settings: MlmTask) -> tuple[NDArray[np.bool_], Hashes]:
    """Tokens that some span covers, and for each the draw of the span that began last.

    Spans begin at every place with the same probability, also before the row and over special
    tokens: so each token is covered with exactly the probability asked for.
    """
    start_share, stop_share = span_rates(settings.mask_probability, settings.mean_span)
    length = draw_BT.shape[1]
    place = np.arange(length + LONGEST_SPAN - 1, dtype=np.uint64)
    starts = _unit_interval(keyed_hash(keys_B[:, None], _START, place[None, :]) >> np.uint64(32)) < start_share
    coin = _unit_interval(keyed_hash(keys_B[:, None], _LENGTH, place[None, :]) >> np.uint64(32))
    # Geometric: log(1 - coin) / log(1 - p), rounded down, plus one.
    lengths = np.full(coin.shape, 1)
    if stop_share < 1.0:
        lengths = np.minimum(np.floor(np.log1p(-coin) / np.log1p(-stop_share)) + 1, LONGEST_SPAN).astype(np.int64)
    covered_BT = np.zeros(draw_BT.shape, dtype=bool)
    unit_BT = draw_BT.copy()
    draws = keyed_hash(keys_B[:, None], _START, _LENGTH, place[None, :])
    for ago in range(LONGEST_SPAN):
        window = slice(LONGEST_SPAN - 1 - ago, LONGEST_SPAN - 1 - ago + length)
        new_BT = starts[:, window] & (lengths[:, window] > ago) & ~covered_BT
        unit_BT[new_BT] = draws[:, window][new_BT]
        covered_BT |= new_BT
    return covered_BT, unit_BT


@lru_cache
def span_rates(probability: float, mean_span: float) -> tuple[float, float]:
    """Probability that a span begins at a place, and that a span ends with each of its tokens.

    Chosen so that the mean length (cut at LONGEST_SPAN) and the share of covered tokens are those
    asked for.  `mean_span` is below LONGEST_SPAN.
    """
    reach = np.arange(LONGEST_SPAN)

    def mean_of(stop: float) -> float:
        return float(((1.0 - stop) ** reach).sum())

    def covered(start: float) -> float:
        return 1.0 - float(np.prod(1.0 - start * (1.0 - stop_share) ** reach))

    stop_share = 1.0 if mean_span <= 1.0 else _solve(lambda stop: -mean_of(stop), -mean_span)
    return _solve(covered, probability), stop_share


def _solve(rising: Callable[[float], float], value: float) -> float:
    """Where a rising function on [0, 1] takes a value; plain halving, exact to the last bits."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < value else (low, middle)
    return (low + high) / 2


def _unit_interval(bits32: Hashes) -> NDArray[np.float64]:
    """Integers below 2**32 as numbers in [0, 1)."""
    return np.asarray(bits32.astype(np.float64) / 2.0**32)
