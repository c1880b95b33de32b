"""Gradients of ZeRO stages 1 and 2: copied once, reduced in buckets while the backward pass goes on.

Enters: DeepSpeed's stage 1 and 2 optimizer, backward passes.  Leaves: this rank's partition of the
summed gradients, handed to DeepSpeed as the flat partition that its step takes.
Promises: gradients are sums over ranks and micro-batches, never averages; all ranks start the same
collectives in the same order, whatever their graphs looked like; at stage 2 a step of one micro-batch
holds this rank's partition and a few buckets, never all gradients at once.

Why not DeepSpeed's own reduction: it copies each gradient four times (into a bucket that it allocates
anew, out of it, into the partition, into a flat tensor), divides it, starts at stage 1 only after the
backward pass, and takes norms tensor by tensor; docs/performance.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_IN_FLIGHT = 2
"""Buckets of stage 2 that are reduced while the next one fills."""


class _FlatPartition(list[Tensor]):
    """What DeepSpeed's step asks for: a gradient that is flat already."""

    def __init__(self, flat: Tensor) -> None:
        super().__init__([flat])
        self.flat_partition = flat


@dataclass
class _Group:
    """One parameter group of the optimizer, as DeepSpeed has flattened it."""

    size: int
    begin: int
    """Of this rank's partition."""
    end: int
    whole: Tensor | None = None
    """[size] gradients of the group; None where only the partition is kept."""
    part: Tensor | None = None
    """[end - begin] gradients of the partition; a view of `whole` where that is kept."""


@dataclass
class _Bucket:
    """Neighbours in a flat group, reduced by one collective."""

    group: _Group
    begin: int
    end: int
    members: list[tuple[nn.Parameter, int]] = field(default_factory=list)
    """Parameters, and where each begins in the group."""
    last_ready: int = 0
    """Place in the model of the parameter whose gradient comes last: the backward pass begins at the end."""
    missing: set[int] = field(default_factory=set)
    """Ids of the members whose gradients are not here yet."""
    buffer: Tensor | None = None
    """At least as long as the bucket."""
    work: Any = None

    @property
    def filled(self) -> Tensor:
        assert self.buffer is not None
        return self.buffer[: self.end - self.begin]


class GradientReduction:
    """Takes the place of the hooks that DeepSpeed has put on the parameters."""

    def __init__(
        self,
        optimizer: Any,
        parameters: Sequence[nn.Parameter],
        *,
        rank: int,
        world_size: int,
        bucket_elements: int,
        overlap: bool,
        keep_whole: bool,
        accumulate_in: torch.dtype | None,
    ) -> None:
        """`parameters`: of the model, in its order.  `bucket_elements`: most elements of a collective, unless
        one parameter is larger.  `overlap`: collectives run beside the backward pass.  `keep_whole`:
        stage 1.  `accumulate_in`: type of the sum over micro-batches where it is not the parameters' own.
        """
        for handle in optimizer._grad_acc_hooks:
            handle.remove()
        optimizer._grad_acc_hooks.clear()
        self._optimizer, self._world_size = optimizer, world_size
        self._overlap, self._keep_whole, self._accumulate_in = overlap, keep_whole, accumulate_in
        self._groups: list[_Group] = []
        self._buckets: list[_Bucket] = []
        order = {id(parameter): number for number, parameter in enumerate(parameters)}
        for members, flat in zip(optimizer.bit16_groups, optimizer.bit16_groups_flat, strict=True):
            size, share = flat.numel(), flat.numel() // world_size
            group = _Group(size, rank * share, (rank + 1) * share)
            self._groups.append(group)
            self._buckets += _divide(group, members, flat, order, bucket_elements)
        self._buckets.sort(key=lambda bucket: bucket.last_ready, reverse=True)
        self._sample: Tensor = optimizer.bit16_groups_flat[0]
        self._next = 0
        self._last_micro_step = self._whole = True
        self._spare: list[Tensor] = []
        for bucket in self._buckets:
            for parameter, offset in bucket.members:
                parameter.register_post_accumulate_grad_hook(partial(self._ready, bucket, offset))  # type: ignore[no-untyped-call]

    def begin(self, index: int, micro_steps: int) -> None:
        """Before the backward pass of micro-step `index`."""
        self._last_micro_step = index == micro_steps - 1
        if index == 0:
            self._whole = self._keep_whole or micro_steps > 1
            self._allocate(self._accumulate_in if micro_steps > 1 else None)
        if self._last_micro_step:
            self._next = 0
            for bucket in self._buckets:
                bucket.missing = {id(parameter) for parameter, _ in bucket.members}

    def finish(self) -> None:
        """After the last backward pass: all gradients of this rank's partition are here."""
        for bucket in self._buckets[self._next :]:
            for parameter, offset in bucket.members:
                if id(parameter) in bucket.missing:
                    # Nothing in the last micro-batch depends on it.
                    self._take(bucket, parameter, offset)
        self._launch()
        for bucket in self._buckets:
            self._settle(bucket)

    def norm(self) -> Tensor:
        """Norm of the gradients of all ranks, fp32; a collective call."""
        squares = [torch.linalg.vector_norm(part, dtype=torch.float32).square() for part in self._parts()]
        total = torch.stack(squares).sum()
        if self._world_size > 1:
            dist.all_reduce(total)
        return total.sqrt()

    def scale(self, factor: float) -> None:
        for part in self._parts():
            part.mul_(factor)

    def hand_over(self) -> None:
        """Let DeepSpeed's step find the gradients; it divides, clips and checks nothing."""
        for number, part in enumerate(self._parts()):
            self._optimizer.averaged_gradients[number] = _FlatPartition(part)

    def release(self) -> None:
        """After the step.  Memory of a CPU is kept: a fresh page costs more than what is written to it."""
        if self._sample.device.type != "cpu":
            self._spare.clear()
            for group in self._groups:
                group.whole = group.part = None

    def _parts(self) -> Iterator[Tensor]:
        for group in self._groups:
            assert group.part is not None
            yield group.part

    def _allocate(self, dtype: torch.dtype | None) -> None:
        dtype = dtype or self._sample.dtype
        for group in self._groups:
            if self._whole:
                if group.whole is None or group.whole.dtype != dtype:
                    # Zeros: padding between parameters is reduced with them.
                    group.whole = torch.zeros(group.size, dtype=dtype, device=self._sample.device)
                elif self._accumulates_apart:
                    group.whole.zero_()
                group.part = group.whole[group.begin : group.end]
            elif group.part is None or group.part.dtype != dtype:
                group.part = torch.zeros(group.end - group.begin, dtype=dtype, device=self._sample.device)

        if self._whole:
            self._spare.clear()

    @property
    def _accumulates_apart(self) -> bool:
        """Micro-batches are summed in the flat groups, and not in the parameters' gradients."""
        whole = self._groups[0].whole
        return self._whole and whole is not None and whole.dtype != self._sample.dtype

    def _ready(self, bucket: _Bucket, offset: int, parameter: nn.Parameter) -> None:
        if self._last_micro_step:
            self._take(bucket, parameter, offset)
            if self._overlap and not bucket.missing:
                self._launch()
        elif self._accumulates_apart:
            assert bucket.group.whole is not None
            assert parameter.grad is not None
            bucket.group.whole[offset : offset + parameter.numel()].add_(parameter.grad.view(-1))
            parameter.grad = None

    def _take(self, bucket: _Bucket, parameter: nn.Parameter, offset: int) -> None:
        """Move a parameter's gradient into its bucket."""
        if id(parameter) not in bucket.missing:
            raise AssertionError("the gradient of a parameter came twice in one backward pass")
        if bucket.buffer is None:
            bucket.buffer = self._buffer(bucket)
        place = bucket.buffer[offset - bucket.begin : offset - bucket.begin + parameter.numel()]
        if self._accumulates_apart:
            if parameter.grad is not None:
                place.add_(parameter.grad.view(-1))
        elif parameter.grad is None:
            place.zero_()
        else:
            place.copy_(parameter.grad.view(-1))
        parameter.grad = None
        bucket.missing.discard(id(parameter))

    def _buffer(self, bucket: _Bucket) -> Tensor:
        if self._whole:
            assert bucket.group.whole is not None
            return bucket.group.whole[bucket.begin : bucket.end]
        size = bucket.end - bucket.begin
        fitting = [spare for spare in self._spare if spare.numel() >= size]
        if not fitting:
            return torch.zeros(size, dtype=self._sample.dtype, device=self._sample.device)
        smallest = min(fitting, key=Tensor.numel)
        self._spare = [spare for spare in self._spare if spare is not smallest]
        if sum(parameter.numel() for parameter, _ in bucket.members) < size:
            # Padding between parameters is reduced with them.
            smallest.zero_()
        return smallest

    def _launch(self) -> None:
        """Reduce the buckets that are full, in the order that all ranks keep."""
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            bucket = self._buckets[self._next]
            if self._world_size > 1:
                bucket.work = dist.all_reduce(bucket.filled, async_op=True)
            self._next += 1
            if not self._whole and self._next > _IN_FLIGHT:
                self._settle(self._buckets[self._next - 1 - _IN_FLIGHT])

    def _settle(self, bucket: _Bucket) -> None:
        """Wait for a bucket, and keep what is this rank's."""
        if bucket.work is not None:
            bucket.work.wait()
            bucket.work = None
        group, buffer = bucket.group, bucket.buffer
        bucket.buffer = None
        if buffer is None or self._whole:
            return
        begin, end = max(bucket.begin, group.begin), min(bucket.end, group.end)
        if begin < end:
            assert group.part is not None
            group.part[begin - group.begin : end - group.begin].copy_(buffer[begin - bucket.begin : end - bucket.begin])
        self._spare.append(buffer)


def _divide(
    group: _Group, parameters: Sequence[nn.Parameter], flat: Tensor, order: dict[int, int], most: int
) -> list[_Bucket]:
    """Buckets of neighbours, the last parameter of the group first."""
    places = [(int(parameter.data.storage_offset() - flat.storage_offset()), parameter) for parameter in parameters]
    buckets: list[_Bucket] = []
    for offset, parameter in sorted(places, key=lambda place: place[0], reverse=True):
        end = offset + parameter.numel()
        if not buckets or buckets[-1].end - offset > most:
            buckets.append(_Bucket(group, offset, end))
        bucket = buckets[-1]
        bucket.begin = offset
        bucket.members.append((parameter, offset))
    for bucket in buckets:
        bucket.last_ready = min(order[id(parameter)] for parameter, _ in bucket.members)
    return buckets
