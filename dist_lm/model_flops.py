"""Work of a model's step, and what share of a device's peak it is.

Enters: the first step that an attempt trains, while it runs.  Leaves: FLOPs a token slot, hence TFLOP/s and MFU.
Promises: matrix products and attention are counted as they are called, forward and backward; layers that
are computed again in the backward pass count once, as in the definition of MFU (Chowdhery et al. 2022,
PaLM, appendix B); what a step computes is not changed.

The rate of later steps is that of the first one, a slot: the few FLOPs of attention that depend on the
length of a row are those of the first step's rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from dist_lm.accelerators import known_as
from dist_lm.ranks import Ranks

_aten = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_: Any, out_val: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _attention_backward(gradient: Any, *rest: Any, **named: Any) -> int:
    # Two products for each of the forward pass; that kernels compute the scores again is not the model's work.
    return 2 * _attention(*rest, **named)


_KERNELS = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{getattr(_aten, f"_scaled_dot_product_{name}"): _attention for name in _KERNELS},
    **{getattr(_aten, f"_scaled_dot_product_{name}_backward"): _attention_backward for name in _KERNELS},
}


class Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """FLOPs of what is called under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        formula = _FORMULAS.get(getattr(func, "_overloadpacket", func))
        # Inside a backward pass only what is computed again needs gradients itself.
        again = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        if formula is not None and not again:
            self.flops += formula(*args, **given, out_val=result)
        return result


class Utilization:
    """Of the first rank's device; the other ranks count nothing, as they do the same work."""

    def __init__(self, ranks: Ranks, precision: str, peak_tflops: float | None) -> None:
        """`peak_tflops`: of one device; None: as the accelerator's data sheet says, where it is known."""
        self._ranks = ranks
        self._peak_tflops = _peak_tflops(ranks.device, precision) if peak_tflops is None else peak_tflops
        self.flops_a_slot = 0.0

    @contextlib.contextmanager
    def step(self, slots: float) -> Iterator[None]:
        """Count the step inside, if none was counted yet.  `slots`: places for tokens of this rank."""
        if not self._ranks.is_first or self.flops_a_slot or not slots:
            yield
            return
        with Counted() as counted:
            yield
        self.flops_a_slot = counted.flops / slots

    def rates(self, slots_per_second: float) -> dict[str, float]:
        """`tflops` of a rank a second, `mfu` where the peak of the device is known.  The slots are those of
        all ranks."""
        tflops = self.flops_a_slot * slots_per_second / self._ranks.world_size / 1e12
        if not tflops:
            return {}
        return {"tflops": tflops} | ({"mfu": tflops / self._peak_tflops} if self._peak_tflops else {})


def _peak_tflops(device: torch.device, precision: str) -> float:
    """0 where nobody knows it, as on a CPU."""
    accelerator = known_as(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return accelerator.peak_flops(precision) / 1e12 if accelerator else 0.0
