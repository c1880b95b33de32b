"""Where text is corrupted: noise spans and prefixes as pure functions of a row's identity.

Enters: a key for each row, lengths.  Leaves: boolean masks and split points.
Promises: equal keys give equal answers in any company; a row of given length always has the same
number of noise tokens and spans, so that rows need no padding.

Source: Raffel et al. 2020 (T5), section 3.3; `random_spans_noise_mask` of its code.
Shapes: B rows, T tokens per row, S spans per row.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.order import Hashes, keyed_hash

_NOISE, _CLEAN, _PREFIX = 111, 112, 113


def noise_counts(length: int, *, density: float, mean_span: float) -> tuple[int, int]:
    """Noise tokens and noise spans of a row of `length` >= 2 tokens; at least one of each."""
    noise = min(max(round(length * density), 1), length - 1)
    spans = min(max(round(noise / mean_span), 1), noise, length - noise)
    return noise, spans


def noise_mask(keys_B: Hashes, length: int, *, density: float, mean_span: float) -> NDArray[np.bool_]:
    """[B, length]: which tokens are noise.  A row begins with text and ends with noise."""
    noise, spans = noise_counts(length, density=density, mean_span=mean_span)
    noise_BS = _pieces(keyed_hash(keys_B, _NOISE), noise, spans)
    clean_BS = _pieces(keyed_hash(keys_B, _CLEAN), length - noise, spans)
    lengths = np.stack([clean_BS, noise_BS], axis=2).reshape(len(keys_B), 2 * spans)
    turns_BT = np.zeros((len(keys_B), length + 1), dtype=np.int64)
    ends = np.cumsum(lengths, axis=1)
    np.put_along_axis(turns_BT, ends, 1, axis=1)
    return np.asarray(np.cumsum(turns_BT[:, :length], axis=1) % 2 == 1)


def _pieces(keys_B: Hashes, total: int, count: int) -> NDArray[np.int64]:
    """[B, count] positive lengths that add up to `total`, all such divisions equally likely."""
    draws = keyed_hash(keys_B[:, None], np.arange(total - 1, dtype=np.uint64)[None, :])
    # The places with the smallest hashes are cut.
    cuts = np.sort(np.argsort(draws, axis=1, kind="stable")[:, : count - 1], axis=1) + 1
    edges = np.concatenate(
        [np.zeros((len(keys_B), 1), np.int64), cuts, np.full((len(keys_B), 1), total, np.int64)], axis=1
    )
    return np.diff(edges, axis=1)


def prefix_lengths(keys_B: Hashes, length: int) -> NDArray[np.int64]:
    """[B]: tokens that the encoder sees, uniform over 1 .. length - 1."""
    return np.asarray(1 + (keyed_hash(keys_B, _PREFIX) % np.uint64(length - 1)).astype(np.int64))


def replace_spans(
    ids_BT: NDArray[np.int64], hidden_BT: NDArray[np.bool_], sentinels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Rows in which sentinel i stands for the i-th stretch of `hidden`.

    Every row must hide the same number of tokens in the same number of stretches.
    """
    before_BT = np.zeros_like(hidden_BT)
    before_BT[:, 1:] = hidden_BT[:, :-1]
    begins_BT = hidden_BT & ~before_BT
    number_BT = np.cumsum(begins_BT, axis=1) - 1
    shown_BT = np.where(begins_BT, sentinels[np.maximum(number_BT, 0)], ids_BT)
    return shown_BT[~hidden_BT | begins_BT].reshape(len(ids_BT), -1)
