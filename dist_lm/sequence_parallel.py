"""Rows that several ranks share: each holds a part of the places, and in attention a part of the heads.

Enters: micro-batches of whole rows, a causal model.  Leaves: this rank's part of them; the model with
attention that exchanges parts of rows for parts of heads, and back (Jacobs et al. 2023, DeepSpeed Ulysses;
deepspeed.sequence.layer does the exchange).
Promises: targets and positions are those of the whole rows, so that the ranks' loss sums add up to the
loss of the rows, and their gradients to its gradient: for the rest of a step a part of a row is what
another rank's rows are.

Shapes: B rows, T tokens per row, P parts, S = T / P, N targets, H heads, D their width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dist_lm.config import SHARED_ROWS_FAMILIES
from dist_lm.errors import ConfigError
from dist_lm.mesh import KEY, Mesh, refuse_heads
from dist_lm.ranks import COLLECTIVE_TIMEOUT_S
from dist_lm.tasks.base import MicroBatch

ATTENTION = "ulysses"
"""Name among transformers' attention functions.  There is no mask function of this name, so that a model
hands on the mask that it was given, or none."""
_HEADS_LAST = 2
_PLACES = 1
_ROWS = 0
"""Dimensions of [B, S, H, D]."""

Exchange = Callable[..., Tensor]


def part_of(batch: MicroBatch, mesh: Mesh) -> MicroBatch:
    """This rank's places of a causal micro-batch.

    Rows are filled up to a multiple of the parts; a causal model's other places do not see what is behind.
    """
    if mesh.parts == 1:
        return batch
    inputs = dict(batch.inputs)
    ids_BT, places_N = inputs["input_ids"], inputs["target_places"]
    num_rows, length = ids_BT.shape
    width = math.ceil(length / mesh.parts)
    positions_BT = inputs.get("position_ids")
    if positions_BT is None:
        positions_BT = torch.arange(length).expand(num_rows, -1)
    filling = (0, width * mesh.parts - length)
    positions_BT = F.pad(positions_BT, filling)
    begin = mesh.part * width
    own = slice(begin, begin + width)
    row_N, column_N = places_N // length, places_N % length
    here_N = (column_N >= begin) & (column_N < begin + width)
    inputs |= {
        "input_ids": F.pad(ids_BT, filling)[:, own].contiguous(),
        "position_ids": positions_BT[:, own].contiguous(),
        "target_places": (row_N * width + column_N - begin)[here_N],
        "target_labels": inputs["target_labels"][here_N],
    }
    if bool((positions_BT[:, 1:length] == 0).any()):
        # Only a row of several documents needs a mask.
        inputs["row_positions"] = positions_BT
    (objective,) = batch.targets
    # Of the tokens each rank counts a share, so that they are counted once.
    tokens = batch.tokens * (mesh.part + 1) // mesh.parts - batch.tokens * mesh.part // mesh.parts
    return replace(batch, inputs=inputs, targets={objective: int(here_N.sum())}, tokens=tokens, slots=num_rows * width)


def share_rows(model: PreTrainedModel, mesh: Mesh, exchange: Callable[[Exchange], Exchange] | None = None) -> None:
    """Let the ranks of a group attend to whole rows together; a collective call.  One part: nothing is done.

    `exchange`: instead of the ranks' own, for one process that wants nothing but shapes (`alone`).
    Raises ConfigError where the model cannot be shared so.
    """
    if mesh.parts == 1:
        return
    config = model.config
    if config.model_type not in SHARED_ROWS_FAMILIES:
        raise ConfigError(
            f"{type(model).__name__} cannot share its rows among ranks",
            where=KEY,
            why=f"Attention of parts of rows is known to be right for {' and '.join(SHARED_ROWS_FAMILIES)} only.",
            do=f"Set {KEY} to 1, or train a model of these kinds.",
        )
    heads = config.num_attention_heads
    refuse_heads(heads, getattr(config, "num_key_value_heads", heads), mesh.parts)
    exchanged = (exchange or _among_ranks(mesh))(_attention_of_heads)

    def attention(
        module: Any, query_BHSD: Tensor, key_BHSD: Tensor, value_BHSD: Tensor, mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        parts = (x.transpose(1, 2) for x in (query_BHSD, key_BHSD, value_BHSD))
        return exchanged(*parts, _ROWS, None, module, mask, **options), None

    AttentionInterface.register(ATTENTION, torch.compiler.disable(attention))  # type: ignore[no-untyped-call]
    model.set_attn_implementation(ATTENTION)


def _among_ranks(mesh: Mesh) -> Callable[[Exchange], Exchange]:
    from deepspeed.sequence.layer import DistributedAttention

    timeout = timedelta(seconds=COLLECTIVE_TIMEOUT_S)
    group, _ = dist.new_subgroups(mesh.parts, timeout=timeout)  # type: ignore[no-untyped-call]
    return lambda inner: DistributedAttention(inner, group, scatter_idx=_HEADS_LAST, gather_idx=_PLACES)


def _attention_of_heads(
    query_BTHD: Tensor, key_BTHD: Tensor, value_BTHD: Tensor, module: Any, mask: Tensor | None, **options: Any
) -> Tensor:
    """[B, T, H, D] of whole rows and this rank's heads."""
    whole = (x.transpose(1, 2) for x in (query_BTHD, key_BTHD, value_BTHD))
    result: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, *whole, mask, **options)[0]
    return result


def alone(parts: int) -> Callable[[Exchange], Exchange]:
    """An exchange without ranks: its tensors have the shapes, and take the memory, of those of a rank."""

    def heads_for_places(x_BSHD: Tensor) -> Tensor:
        rows, places, heads, width = x_BSHD.shape
        grouped = x_BSHD.reshape(rows, places, parts, heads // parts, width).transpose(1, 2)
        return grouped.reshape(rows, places * parts, heads // parts, width)

    def places_for_heads(x_BTHD: Tensor) -> Tensor:
        rows, places, heads, width = x_BTHD.shape
        grouped = x_BTHD.reshape(rows, parts, places // parts, heads, width).transpose(1, 2)
        return grouped.reshape(rows, places // parts, parts * heads, width)

    def around(inner: Exchange) -> Exchange:
        def exchanged(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
            # Before the arguments of `inner` stand two that are DeepSpeed's own.
            whole = [heads_for_places(x) for x in (query, key, value)]
            return places_for_heads(inner(*whole, *rest[2:], **options))

        return exchanged

    return around
