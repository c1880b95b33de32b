"""The sharded state of an engine as named 1-D fragments, to and from.

Enters: an Engine of any ZeRO stage and world size.  Leaves: for each parameter the ranges that this
rank owns, in fp32: the weights and every tensor of the optimizer state.
Promises: the ranges of all ranks cover each parameter exactly once; after `restore`, weights,
optimizer state, steps and hyper-parameters are those that were saved, whatever the stage and the
number of ranks were.

This is the one module that knows where DeepSpeed keeps its state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lm.engine import Engine
from dist_lm.errors import DataError

WEIGHT = "weight"
"""Key of the fp32 parameter itself, beside the optimizer's keys (exp_avg, exp_avg_sq)."""
_SCALE_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
MODEL_PREFIX = "model."
"""TaskModule's prefix: fragments carry the Hugging Face model's own names."""


@dataclass(frozen=True)
class Fragment:
    """A range of one parameter that this rank owns, as live 1-D views or copies."""

    name: str
    shape: tuple[int, ...]
    start: int
    tensors: dict[str, Tensor]

    @property
    def size(self) -> int:
        return self.tensors[WEIGHT].numel()


Read = Callable[[str, str, int, int], Tensor]
"""(parameter, key, start, size) -> fp32 tensor [size]."""


def own_fragments(engine: Engine) -> Iterator[Fragment]:
    """Fragments of this rank, in the order of the model's parameters."""
    layout = _layout(engine)
    for name, parameter in _trainable(engine):
        yield from layout.fragments(name, parameter)


def optimizer_step(engine: Engine) -> int | None:
    """Updates that the optimizer has counted; None where it does not count, or has no state yet."""
    steps = {int(state["step"]) for state in _base_optimizer(engine).state.values() if "step" in state}
    if len(steps) > 1:
        raise AssertionError(f"parameters disagree about the optimizer's step: {sorted(steps)}")
    return steps.pop() if steps else None


def loss_scale(engine: Engine) -> dict[str, Any]:
    """State of fp16's dynamic loss scale; empty for other precisions."""
    keeper = _scale_keeper(engine)
    return {name: getattr(keeper, name) for name in _SCALE_FIELDS if hasattr(keeper, name)}


def restore_loss_scale(engine: Engine, state: dict[str, Any]) -> None:
    """State of `loss_scale`; an empty one leaves the scale as it is."""
    keeper = _scale_keeper(engine)
    for name, value in state.items():
        setattr(keeper, name, value)


def _scale_keeper(engine: Engine) -> Any:
    """The object that holds the scale: DeepSpeed has one for stage 0 and another for ZeRO."""
    optimizer = engine.deepspeed_engine.optimizer
    if not engine.deepspeed_engine.fp16_enabled():
        return None
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", optimizer)


def restore(engine: Engine, read: Read, *, step: int) -> None:
    """Fill weights and optimizer state from `read`; a collective call of all ranks.

    `step`: updates that the optimizer had counted.
    """
    layout = _layout(engine)
    with torch.no_grad():
        layout.prepare()
        for name, parameter in _trainable(engine):
            layout.fill(name, parameter, read)
        for state in _base_optimizer(engine).state.values():
            # A tensor of its own for each parameter: DeepSpeed's own loader shares one at stage 3.
            if torch.is_tensor(state.get("step")):
                state["step"] = torch.full_like(state["step"], float(step))
            elif "step" in state:
                state["step"] = step
        layout.publish()
    engine.check_groups()
    if optimizer_step(engine) not in (step, None):
        raise DataError(
            f"the optimizer stands at step {optimizer_step(engine)} after loading step {step}",
            do="This is a defect of dist_lm with this optimizer; please report it.",
        )


def _trainable(engine: Engine) -> Iterator[tuple[str, Any]]:
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad:
            yield name.removeprefix(MODEL_PREFIX), parameter


def _base_optimizer(engine: Engine) -> Any:
    """The torch optimizer under DeepSpeed's wrapper."""
    optimizer = engine.deepspeed_engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


def _layout(engine: Engine) -> _Layout:
    optimizer = engine.deepspeed_engine.optimizer
    if engine.stage == 3:
        return _Partitioned(engine)
    if hasattr(optimizer, "fp32_groups"):
        return _MasterCopies(engine)
    if isinstance(optimizer, torch.optim.Optimizer):
        return _Whole(engine)
    return _FlatPartitions(engine)


class _Layout:
    """Where one kind of DeepSpeed optimizer keeps weights and state."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.optimizer = engine.deepspeed_engine.optimizer
        self.rank, self.world_size = engine.ranks.rank, engine.ranks.world_size

    def fragments(self, name: str, parameter: Any) -> Iterator[Fragment]:
        raise NotImplementedError

    def prepare(self) -> None:
        """Create optimizer state that DeepSpeed would create at the first step."""

    def fill(self, name: str, parameter: Any, read: Read) -> None:
        raise NotImplementedError

    def publish(self) -> None:
        """Make the weights that the model computes with follow the fp32 ones."""


class _Whole(_Layout):
    """Stage 0 in fp32: every rank holds everything.  Each writes an equal share."""

    def _owner(self, parameter: Any) -> Any:
        return parameter

    def fragments(self, name: str, parameter: Any) -> Iterator[Fragment]:
        share = -(-parameter.numel() // self.world_size)
        start = min(self.rank * share, parameter.numel())
        end = min(start + share, parameter.numel())
        if start == end:
            return
        owner = self._owner(parameter)
        tensors = {WEIGHT: owner.detach().flatten()[start:end]}
        for key, value in _tensor_state(self._state(), owner):
            tensors[key] = value.flatten()[start:end]
        yield Fragment(name, tuple(parameter.shape), start, tensors)

    def _state(self) -> Any:
        return _base_optimizer(self.engine).state

    def prepare(self) -> None:
        optimizer = _base_optimizer(self.engine)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        _create_state(optimizer, parameters)

    def fill(self, name: str, parameter: Any, read: Read) -> None:
        owner, size = self._owner(parameter), parameter.numel()
        owner.data.copy_(read(name, WEIGHT, 0, size).view_as(owner))
        for key, value in _tensor_state(self._state(), owner):
            value.copy_(read(name, key, 0, size).view_as(value))


class _MasterCopies(_Whole):
    """Stage 0 in bf16: an fp32 copy of each parameter on every rank."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._copies = {
            id(low): high
            for lows, highs in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True)
            for low, high in zip(lows, highs, strict=True)
        }

    def _owner(self, parameter: Any) -> Any:
        return self._copies[id(parameter)]

    def publish(self) -> None:
        for lows, highs in zip(self.optimizer.fp16_groups, self.optimizer.fp32_groups, strict=True):
            for low, high in zip(lows, highs, strict=True):
                low.data.copy_(high.data)


class _FlatPartitions(_Layout):
    """Stages 1 and 2: parameters are views of flat groups, each rank owns a range of each group."""

    def fragments(self, name: str, parameter: Any) -> Iterator[Fragment]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return
        tensors = {WEIGHT: mapping.get_hp_fragment()}
        # DeepSpeed's own links to the optimizer state are made once, when some groups may still have
        # none; so the state is looked up in the flat partition itself.
        optimizer = _base_optimizer(self.engine)
        (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
        address = mapping.get_hp_fragment_address()
        for key, value in _tensor_state(optimizer.state, flat):
            tensors[key] = value.narrow(0, address.start, address.numel)
        yield Fragment(name, tuple(parameter.shape), mapping.lp_fragment_address.start, tensors)

    def prepare(self) -> None:
        optimizer = _base_optimizer(self.engine)
        partitions = [p for group in optimizer.param_groups for p in group["params"]]
        _create_state(optimizer, partitions)

    def fill(self, name: str, parameter: Any, read: Read) -> None:
        for fragment in self.fragments(name, parameter):
            for key, value in fragment.tensors.items():
                value.data.copy_(read(name, key, fragment.start, fragment.size))

    def publish(self) -> None:
        self.optimizer.update_lp_params()


class _Partitioned(_Layout):
    """Stage 3: each rank holds a padded range of every parameter."""

    def _range(self, parameter: Any) -> tuple[int, int, int]:
        """Start of this rank's range, its size without padding, and with it."""
        padded = parameter.ds_tensor.numel()
        start = self.rank * padded
        return start, max(0, min(padded, parameter.ds_numel - start)), padded

    def prepare(self) -> None:
        base, flats = _base_optimizer(self.engine), self.optimizer.fp32_partitioned_groups_flat
        # Between steps DeepSpeed leaves the groups of the torch optimizer empty.
        for number, flat in enumerate(flats):
            base.param_groups[self.optimizer.sub_group_to_group_id[number]]["params"].append(flat)
        _create_state(base, flats)
        for group in base.param_groups:
            group["params"] = []

    def _keys(self, parameter: Any) -> list[str]:
        state = next(iter(_base_optimizer(self.engine).state.values()))
        return [key for key, value in state.items() if key != "step" and torch.is_tensor(value)]

    def fragments(self, name: str, parameter: Any) -> Iterator[Fragment]:
        start, size, _ = self._range(parameter)
        if not size:
            return
        local = self.optimizer.get_local_fp32_param
        tensors = {WEIGHT: local(parameter)[:size]}
        for key in self._keys(parameter):
            tensors[key] = local(parameter, key)[:size]
        yield Fragment(name, tuple(parameter.ds_shape), start, tensors)

    def fill(self, name: str, parameter: Any, read: Read) -> None:
        start, size, padded = self._range(parameter)
        for key in (WEIGHT, *self._keys(parameter)):
            value = torch.zeros(padded)
            if size:
                value[:size] = read(name, key, start, size)
            value = value.to(self.engine.ranks.device)
            if key == WEIGHT:
                self.optimizer.set_local_hp_param(value, parameter)
            else:
                self.optimizer.set_local_hp_param(value, parameter, key)

    def publish(self) -> None:
        optimizer = self.optimizer
        for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
            low = optimizer.fp16_partitioned_groups_flat[number]
            low.data.copy_(flat.data)
            partitions = optimizer.fp16_partitioned_groups[number]
            for partition, view in zip(partitions, optimizer.unflatten(low, partitions), strict=True):
                partition.data = view.data
        # Small parameters stay gathered on every rank: their gathered copies are renewed.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)


def _tensor_state(states: Any, owner: Any) -> Iterator[tuple[str, Tensor]]:
    for key, value in states.get(owner, {}).items():
        if torch.is_tensor(value) and value.shape == owner.shape:
            yield key, value


def _create_state(optimizer: Any, parameters: list[Any]) -> None:
    """Let a fresh optimizer create its state: one step with zero gradients and zero rate.

    Weights do not move: the learning rate is 0, and with it the decoupled weight decay.
    """
    missing = [p for p in parameters if not optimizer.state.get(p)]
    if not missing:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    gradients = [p.grad for p in parameters]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
