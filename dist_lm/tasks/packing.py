"""Samples that share rows: where they lie, what a model is given of them, and whether it keeps them apart.

Enters: lengths of samples; a model.  Leaves: a layout and inputs; the number of the first position.
Promises: every token stands once, no row is over the limit; a layout is a function of the lengths alone,
and in models of _LEAST_HIDDEN or wider never more work than rows padded to the longest sample; a model that
was tried gives each sample the hidden states that it has alone.

Source: Krell et al. 2021, Efficient Sequence Packing without Cross-contamination.
Shapes: S samples, T tokens of the longest sample, R rows, W tokens per row, N samples of a pair head,
H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_lm.data.packing import best_fit
from dist_lm.tasks.base import LENGTH_MULTIPLE
from dist_lm.tasks.heads import close, takes, trial

_WIDTHS = 16
"""Widths of a row that are compared, at most."""
_LEAST_HIDDEN = 256
_LINEAR_COST = 6 * _LEAST_HIDDEN
"""A token's matrix products cost 24 H^2, its attention 4 H W: together in proportion to 6 H + W (PaLM, appendix B).
What saves work so in a narrow model saves it in a wide one, as it has fewer places for tokens."""
_TRIAL_LENGTHS = (3, 5)


@dataclass(frozen=True)
class Layout:
    """Where the samples of a micro-batch lie."""

    num_rows: int
    width: int
    begin_S: NDArray[np.int64]
    """Place of each sample's first token in the rows laid end to end."""

    def places_ST(self, length: int) -> NDArray[np.int64]:
        """Places of the first `length` tokens of each sample, as far as it has them."""
        return self.begin_S[:, None] + np.arange(length)

    def inputs(
        self, ids_ST: NDArray[np.int64], kinds_ST: NDArray[np.int64], lengths_S: NDArray[np.int64], pad_id: int
    ) -> dict[str, Tensor]:
        """`input_ids`, `token_type_ids`, `position_ids` (from 0 in each sample) and `sample_numbers` (from 1;
        0 is padding), all [R, W]."""
        count, length = ids_ST.shape
        held_ST = np.arange(length) < lengths_S[:, None]
        places = self.places_ST(length)[held_ST]
        numbers_ST = np.broadcast_to(np.arange(1, count + 1)[:, None], ids_ST.shape)
        positions_ST = np.broadcast_to(np.arange(length), ids_ST.shape)
        columns = {
            "input_ids": (ids_ST, pad_id),
            "token_type_ids": (kinds_ST, 0),
            "position_ids": (positions_ST, 0),
            "sample_numbers": (numbers_ST, 0),
        }
        found = {}
        for name, (values_ST, fill) in columns.items():
            flat = np.full(self.num_rows * self.width, fill, dtype=np.int64)
            flat[places] = values_ST[held_ST]
            found[name] = torch.from_numpy(flat.reshape(self.num_rows, self.width))
        return found


def lay_out(lengths_S: NDArray[np.int64], *, limit: int) -> Layout:
    """The layout that costs least, in rows of at most `limit` tokens; no sample is longer."""
    sizes = dict(enumerate(lengths_S.tolist()))
    shortest = min(-(-max(sizes.values()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, limit)
    stride = -(-max(limit // _WIDTHS, 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    widths = [shortest, *range(limit, shortest, -stride)]

    def cost(width: int, num_rows: int) -> int:
        return num_rows * width * (_LINEAR_COST + width)

    total = sum(sizes.values())
    best_width, best_rows = 0, list[list[int]]()
    # The most promising first, so that the others need not be tried.
    for width in sorted(widths, key=lambda width: (cost(width, -(-total // width)), width)):
        if best_rows and cost(width, -(-total // width)) >= cost(best_width, len(best_rows)):
            break
        rows = best_fit(sizes, width)
        if not best_rows or cost(width, len(rows)) < cost(best_width, len(best_rows)):
            best_width, best_rows = width, rows
    begin_S = np.zeros(len(sizes), dtype=np.int64)
    for number, members in enumerate(best_rows):
        lengths = lengths_S[members]
        begin_S[members] = number * best_width + np.cumsum(lengths) - lengths
    return Layout(len(best_rows), best_width, begin_S)


def packed_arguments(model: Any, inputs: Mapping[str, Tensor], first_position: int) -> dict[str, Tensor]:
    """What a model takes of `Layout.inputs` beside ids: positions, and a mask [R, 1, W, W] of blocks.

    Padding attends to the padding of its row: a place that attends to nothing has no softmax.
    """
    numbers_RW = inputs["sample_numbers"]
    same = (numbers_RW[:, :, None] == numbers_RW[:, None, :])[:, None]
    if model.config._attn_implementation != "sdpa":
        # Attention in plain torch adds its mask to the scores.
        same = torch.zeros(same.shape, dtype=model.dtype, device=same.device).masked_fill(
            ~same, torch.finfo(model.dtype).min
        )
    return {"position_ids": inputs["position_ids"] + first_position, "attention_mask": same}


def pooled(model: Any, hidden_NH: Tensor) -> Tensor:
    """The pooled output of N samples by the hidden states of their first tokens."""
    base = model.base_model
    if hasattr(base, "pooler_activation"):
        # ALBERT's pooler is a plain matrix.
        result: Tensor = base.pooler_activation(base.pooler(hidden_NH))
        return result
    # The others take rows, and pool the first token of each.
    result = base.pooler(hidden_NH[:, None])
    return result


def find_first_position(model: Any, *, pairs: bool) -> int | None:
    """Number of the first position of a sample; None where the model cannot keep samples of a row apart.

    Two samples in one row are tried against each alone; with `pairs` their pooled outputs, too.
    """
    base = model.base_model
    # A window over neighbours is cut out of a mask that transformers makes itself.
    windows = set(getattr(model.config, "layer_types", None) or ()) - {"full_attention"}
    if windows or not (takes(base, "position_ids") and takes(base, "attention_mask")):
        return None
    pad_id = model.config.pad_token_id or 0
    with trial(model):
        # RoBERTa and its kin number positions from the padding token's number on.
        for first in (0, pad_id + 1):
            try:
                if _keeps_apart(model, first, pad_id, pairs=pairs):
                    return first
            except Exception:
                # Whatever a model raises at a mask of this form, it does not take it.
                return None
    return None


def _keeps_apart(model: Any, first: int, pad_id: int, *, pairs: bool) -> bool:
    base, lengths_S = model.base_model, np.array(_TRIAL_LENGTHS)
    count, total = len(lengths_S), int(lengths_S.sum())
    layout = Layout(1, total, np.cumsum(lengths_S) - lengths_S)
    ids_ST = (pad_id + 1 + np.arange(count * total).reshape(count, total)) % model.config.vocab_size
    inputs = layout.inputs(ids_ST, np.zeros_like(ids_ST), lengths_S, pad_id)
    together = base(input_ids=inputs["input_ids"], **packed_arguments(model, inputs, first)).last_hidden_state[0]
    for begin, length, ids_T in zip(layout.begin_S, lengths_S, ids_ST, strict=True):
        alone = base(input_ids=torch.from_numpy(ids_T[None, :length]))
        if not close(together[begin : begin + length], alone.last_hidden_state[0]):
            return False
        if pairs and not close(pooled(model, together[begin : begin + 1]), alone.pooler_output):
            return False
    return True
