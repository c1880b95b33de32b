"""What a rank holds beside activations: weights, gradients, optimizer states, DeepSpeed's buffers.

Enters: numbers of parameters, ZeRO stage, ranks.  Leaves: bytes by part.
Promises: the arithmetic is that of this project's engine on the installed DeepSpeed: AdamW's two
moments in fp32, an fp32 master copy wherever ZeRO partitions, gradients in the weights' type unless
they are summed over micro-steps in bf16 or fp16.

Source: Rajbhandari et al. 2020 (ZeRO), section 3, and DeepSpeed 0.19's stage_1_and_2.py and stage3.py
for the copies that the paper does not have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_lm.deepspeed_keys import default_bucket, offloads

_FP32 = 4
_BUCKET_OF_STAGE_0 = 500_000_000
"""In numbers; no key changes it."""
_BUCKETS_IN_FLIGHT = 3
"""Of stage 2: one that fills, and those that are reduced (dist_lm/gradients.py)."""
_DEFAULT_LIVE = 1_000_000_000
"""stage3_max_live_parameters."""
_DEFAULT_PREFETCH = 50_000_000
"""stage3_prefetch_bucket_size."""


@dataclass(frozen=True)
class States:
    """Bytes that one rank holds."""

    weights: float
    gradients: float
    """As they stand when the optimizer begins."""
    optimizer: float
    """Master copy and moments."""
    whole_gradients: float
    """That stand beside the activations of every pass: in flat buffers, or waiting for the last of several
    micro-steps; 0 where they come as the activations go."""
    buffers: float
    """Beside the passes."""
    reduction: float
    """Once the passes are over."""
    gathered: float
    """ZeRO-3: whole weights, that exist for a while beside the partition."""
    host: float
    """In the host's memory, of what is offloaded."""

    @property
    def between_steps(self) -> float:
        return self.weights + self.optimizer

    def peak(self, stage: int, activations: float, with_gradients: float) -> float:
        """Most that exists at one time: in the passes, or when gradients are reduced and the optimizer steps.

        `activations`: of one micro-step without gradients; `with_gradients`: beside gradients as they come.
        """
        if self.whole_gradients:
            passes = self.whole_gradients + activations
        elif stage < 2:
            passes = with_gradients
        else:
            # Gradients go into DeepSpeed's bucket as they come, and from it into the partition.
            passes = min(with_gradients, activations + self.buffers) if stage == 2 else activations + self.buffers
            passes += self.gradients if stage == 3 else 0.0
        after = self.gradients + self.reduction
        return self.between_steps + self.gathered + max(passes, after)


def states(
    parameters: int,
    frozen: int,
    *,
    stage: int,
    ranks: int,
    precision: str,
    micro_steps: int,
    zero: Mapping[str, Any],
    own_reduction: bool,
    on_gpu: bool = True,
) -> States:
    """`zero`: the block zero_optimization of the DeepSpeed settings.  `own_reduction`: what
    driven.reduces_itself says of these settings."""
    width = _FP32 if precision == "fp32" else 2
    share = 1 / ranks if stage else 1.0
    summed = _FP32 if micro_steps > 1 and stage else width
    has_master = stage > 0 or precision != "fp32"
    optimizer = parameters * _FP32 * (3 if has_master else 2) * share
    offloaded = offloads(zero, "offload_optimizer")
    bucket = _number(zero, "reduce_bucket_size", default_bucket(stage, parameters))
    # The partition's gradients are laid out once more for the optimizer, in its type.
    copied = parameters * _FP32 * share if stage in (1, 2) and not (own_reduction and summed == _FP32) else 0.0
    whole = 0.0
    if own_reduction:
        # dist_lm/gradients.py: flat buffers, of the partition alone where stage 2 reduces as gradients come.
        flat = parameters * summed * (share if stage == 2 and micro_steps == 1 else 1.0)
        gradients = flat + copied
        whole = flat + (min(_BUCKETS_IN_FLIGHT * bucket, parameters) * width if stage == 2 and micro_steps == 1 else 0)
        if micro_steps > 1 and precision == "fp32":
            # Summed in the parameters' own gradients first.
            whole += parameters * width
    else:
        # Stage 2 reduces once, at the end (engine.py): until then several micro-steps' are whole.
        gradients = parameters * summed * (1.0 if stage < 2 or (stage == 2 and micro_steps > 1) else share) + copied
        whole = parameters * summed if micro_steps > 1 and stage < 3 else 0.0
    weights = (parameters + frozen) * width * (share if stage == 3 else 1.0)
    # Pages of a CPU are taken when they are written, the memory of a GPU when it is asked for.
    bucket = bucket if stage == 3 and on_gpu else min(parameters, bucket)
    buffer = float(bucket * width * (2 if zero.get("overlap_comm") and stage in (1, 2) else 1))
    buffers = reduction = gathered = 0.0
    if stage == 3:
        live = min(parameters + frozen, _number(zero, "stage3_max_live_parameters", _DEFAULT_LIVE))
        gathered = float(live * width)
        # What is gathered ahead comes in one piece, from which the weights are copied.
        buffers = buffer + min(live, _number(zero, "stage3_prefetch_bucket_size", _DEFAULT_PREFETCH)) * width
        reduction = buffer
    elif own_reduction:
        buffers = reduction = whole - flat if stage == 2 and micro_steps == 1 else 0.0
    elif stage == 2:
        buffers = reduction = buffer
    elif stage or ranks > 1:
        reduction = buffer if stage else float(min(parameters, _BUCKET_OF_STAGE_0) * width)
    host = 0.0
    if offloaded:
        host, optimizer = optimizer + parameters * _FP32 * share, 0.0
        gradients = 0.0 if stage >= 2 else gradients
    if offloads(zero, "offload_param"):
        host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, whole, buffers, reduction, gathered, host)


def _number(zero: Mapping[str, Any], key: str, default: int) -> int:
    value = zero.get(key, default)
    return int(value) if isinstance(value, int | float) else default
