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

_FP32 = 4
_DEFAULT_BUCKET = 500_000_000
"""reduce_bucket_size and allgather_bucket_size, in numbers."""
_DEFAULT_LIVE = 1_000_000_000
"""stage3_max_live_parameters."""


@dataclass(frozen=True)
class States:
    """Bytes that one rank holds."""

    weights: float
    gradients: float
    """As they stand when the optimizer begins."""
    optimizer: float
    """Master copy and moments."""
    buffers: float
    gathered: float
    """ZeRO-3: weights of other ranks that are held for a while."""
    host: float
    """In the host's memory, of what is offloaded."""

    @property
    def between_steps(self) -> float:
        return self.weights + self.optimizer


def states(
    parameters: int,
    frozen: int,
    *,
    stage: int,
    ranks: int,
    precision: str,
    micro_steps: int,
    zero: Mapping[str, Any],
) -> States:
    """`zero`: the block zero_optimization of the DeepSpeed settings."""
    width = _FP32 if precision == "fp32" else 2
    share = 1 / ranks if stage else 1.0
    summed = _FP32 if micro_steps > 1 and stage else width
    has_master = stage > 0 or precision != "fp32"
    optimizer = parameters * _FP32 * (3 if has_master else 2) * share
    gradients = parameters * summed * (share if stage >= 2 else 1.0)
    if stage in (1, 2):
        # The partition's gradients are laid out once more for the optimizer, in its type.
        gradients += parameters * _FP32 * share
    if stage == 2 and micro_steps > 1:
        # Reduced once, at the end (engine.py): until then they are whole.
        gradients = parameters * summed + parameters * _FP32 * share
    weights = (parameters + frozen) * width * (share if stage == 3 else 1.0)
    bucket = min(parameters, _number(zero, "reduce_bucket_size", _DEFAULT_BUCKET))
    buffers = bucket * width * (2 if zero.get("overlap_comm") and stage in (1, 2) else 1) if ranks > 1 or stage else 0
    live = min(parameters + frozen, _number(zero, "stage3_max_live_parameters", _DEFAULT_LIVE))
    gathered = live * width * (1 - share) if stage == 3 else 0.0
    host = 0.0
    if zero.get("offload_optimizer", {}).get("device", "none") != "none":
        host, optimizer = optimizer + parameters * _FP32 * share, 0.0
        gradients = 0.0 if stage >= 2 else gradients
    if zero.get("offload_param", {}).get("device", "none") != "none":
        host, weights = host + weights, 0.0
    return States(weights, gradients, optimizer, float(buffers), gathered, host)


def _number(zero: Mapping[str, Any], key: str, default: int) -> int:
    value = zero.get(key, default)
    return int(value) if isinstance(value, int | float) else default
