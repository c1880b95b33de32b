"""Weights at ZeRO stage 3: gathered once a step, in buckets ahead of the layers that read them.

Enters: a module whose weights DeepSpeed has partitioned.  Leaves: whole weights from the first forward
pass of a step to its last backward pass.
Promises: all ranks start the same collectives in the same order, whatever their graphs look like; a
weight is waited for where it is first read; every micro-batch of a step reads what was gathered once.

Why not DeepSpeed's own hooks: they let weights go early, for which they run four functions in Python
around each call of each module and gather small weights one by one.  Where all weights fit into
stage3_max_live_parameters they keep them for the whole step just the same.
"""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.parameter_offload import ZeROOrderedDict
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import nn

_AHEAD = 2
"""Buckets that are gathered while the weights of one are read."""


class _Watched(ZeROOrderedDict):  # type: ignore[misc]
    """A module's own weights, gathered before they are handed out."""

    def __init__(self, module: nn.Module, weights: WholeWeights) -> None:
        super().__init__(module, module._parameters)
        self._weights = weights

    def __getitem__(self, name: str) -> Any:
        if self._weights.pending:
            self._weights.wait_for(super(ZeROOrderedDict, self).__getitem__(name))
        return super().__getitem__(name)


class WholeWeights:
    """Takes the place of the hooks that DeepSpeed has put on the modules."""

    def __init__(self, module: nn.Module, optimizer: Any, *, bucket_elements: int) -> None:
        """`optimizer`: DeepSpeed's, of stage 3.  `bucket_elements`: most of one gathering, or a single weight."""
        self._offload = optimizer.parameter_offload
        self._offload.destroy()
        self._buckets = _divide([*module.parameters()], bucket_elements)
        self._place = {id(weight): number for number, bucket in enumerate(self._buckets) for weight in bucket}
        self._handles: list[Any] = []
        self._arrived = 0
        self.pending = False
        for child in module.modules():
            if child._parameters:
                child._parameters = _Watched(child, self)

    def begin(self) -> None:
        """Before a forward pass; what is whole already stays."""
        if not self._handles:
            self.pending = True
            self._gather(_AHEAD)

    def wait_for(self, weight: nn.Parameter | None) -> None:
        if weight is not None:
            self._arrive(self._place[id(weight)] + 1)

    def finish(self) -> None:
        """Before a backward pass: all weights are here, on every rank, whatever was read."""
        self._arrive(len(self._buckets))

    def release(self) -> None:
        """Each rank keeps its part."""
        self.finish()
        self._offload.partition_all_parameters()
        self.released()

    def released(self) -> None:
        """DeepSpeed's step has let the weights go."""
        self._handles.clear()
        self._arrived = 0
        self.pending = False

    def _gather(self, up_to: int) -> None:
        for bucket in self._buckets[len(self._handles) : up_to]:
            missing = [weight for weight in bucket if weight.ds_status == ZeroParamStatus.NOT_AVAILABLE]
            self._handles.append(bucket[0].all_gather_coalesced(missing) if missing else None)

    def _arrive(self, up_to: int) -> None:
        while self._arrived < up_to:
            self._gather(self._arrived + 1 + _AHEAD)
            handle = self._handles[self._arrived]
            if handle is not None:
                handle.wait()
            # The bucket that the weights were copied out of is freed with it.
            self._handles[self._arrived] = None
            self._arrived += 1
        self.pending = self._arrived < len(self._buckets)


def _divide(weights: list[nn.Parameter], most: int) -> list[list[Any]]:
    """Buckets of neighbours, in the order of the model."""
    buckets: list[list[Any]] = []
    size = 0
    for weight in weights:
        numel = int(weight.ds_numel)  # type: ignore[attr-defined]
        if not buckets or size + numel > most:
            buckets.append([])
            size = 0
        buckets[-1].append(weight)
        size += numel
    return buckets
