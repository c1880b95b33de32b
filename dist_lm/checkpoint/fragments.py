"""The sharded state of an engine as named 1-D fragments, to and from.

Enters: an Engine of any ZeRO stage and world size.  Leaves: for each parameter the ranges that this
rank owns, in fp32: the weights and every tensor of the optimizer state.
Promises: the ranges of all ranks cover each parameter exactly once; after `restore`, weights,
optimizer state, steps and hyper-parameters are those that were saved, whatever the stage and the
number of ranks were.  Any optimizer that treats each element alone will do: what its state holds an
element is a fragment, what it counts for all parameters alike is a scalar.

This is the one module that knows where DeepSpeed keeps its state.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

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


class Source(Protocol):
    """Where `restore` reads from."""

    def read(self, name: str, key: str, start: int, size: int) -> Tensor:
        """fp32 tensor [size]: elements start .. start + size of the flattened parameter or state."""

    def keys(self) -> set[str]:
        """WEIGHT and the keys of the optimizer's state."""


def own_fragments(engine: Engine) -> Iterator[Fragment]:
    """Fragments of this rank, in the order of the model's parameters."""
    layout = _layout(engine)
    for name, parameter in _trainable(engine):
        yield from layout.fragments(name, parameter)


def optimizer_scalars(engine: Engine) -> dict[str, float]:
    """What the optimizer's state holds once for a parameter, such as its step; the same for all of them.

    Empty where it holds nothing, or has no state yet.
    """
    found = [_scalars(owner, state) for owner, state in _base_optimizer(engine).state.items() if state]
    if any(scalars != found[0] for scalars in found):
        raise AssertionError(f"parameters disagree about the optimizer's scalars: {found}")
    return found[0] if found else {}


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


def restore(engine: Engine, source: Source, scalars: dict[str, float]) -> None:
    """Fill weights and optimizer state from `source`; a collective call of all ranks.

    `scalars`: those of `optimizer_scalars` when it was saved.  Raises DataError where another kind of
    optimizer wrote it.
    """
    layout, states = _layout(engine), _base_optimizer(engine).state
    saved = source.keys()
    with torch.no_grad():
        if saved == {WEIGHT} and not scalars:
            # Saved before the first update, or by an optimizer without state.
            states.clear()
        else:
            layout.prepare()
        live = {WEIGHT, *(key for owner, state in states.items() for key, _ in _tensors(owner, state))}
        if saved != live:
            raise DataError(
                "the checkpoint is of another optimizer",
                why=f"It holds {', '.join(sorted(saved))}; this one has {', '.join(sorted(live))}.",
                do="Go on with the optimizer of before, or begin a new run with model.from=RUN.",
            )
        for name, parameter in _trainable(engine):
            layout.fill(name, parameter, source)
        for state in states.values():
            for key, value in scalars.items():
                # A tensor of its own for each parameter: DeepSpeed's own loader shares one at stage 3.
                old = state[key]
                state[key] = torch.full_like(old, value) if torch.is_tensor(old) else type(old)(value)
        layout.publish()
    engine.check_groups()
    if optimizer_scalars(engine) != scalars:
        raise AssertionError(f"the optimizer stands at {optimizer_scalars(engine)} after loading {scalars}")


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

    def fill(self, name: str, parameter: Any, source: Source) -> None:
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
        for key, value in _tensors(owner, self._state().get(owner, {})):
            tensors[key] = value.flatten()[start:end]
        yield Fragment(name, tuple(parameter.shape), start, tensors)

    def _state(self) -> Any:
        return _base_optimizer(self.engine).state

    def prepare(self) -> None:
        optimizer = _base_optimizer(self.engine)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        _create_state(optimizer, parameters)

    def fill(self, name: str, parameter: Any, source: Source) -> None:
        owner, size = self._owner(parameter), parameter.numel()
        owner.data.copy_(source.read(name, WEIGHT, 0, size).view_as(owner))
        for key, value in _tensors(owner, self._state().get(owner, {})):
            value.copy_(source.read(name, key, 0, size).view_as(value))


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
        for key, value in _tensors(flat, optimizer.state.get(flat, {})):
            tensors[key] = value.narrow(0, address.start, address.numel)
        yield Fragment(name, tuple(parameter.shape), mapping.lp_fragment_address.start, tensors)

    def prepare(self) -> None:
        optimizer = _base_optimizer(self.engine)
        partitions = [p for group in optimizer.param_groups for p in group["params"]]
        _create_state(optimizer, partitions)

    def fill(self, name: str, parameter: Any, source: Source) -> None:
        for fragment in self.fragments(name, parameter):
            for key, value in fragment.tensors.items():
                value.data.copy_(source.read(name, key, fragment.start, fragment.size))

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

    def _keys(self) -> list[str]:
        owner, state = next(iter(_base_optimizer(self.engine).state.items()), (None, {}))
        return [key for key, _ in _tensors(owner, state)]

    def fragments(self, name: str, parameter: Any) -> Iterator[Fragment]:
        start, size, _ = self._range(parameter)
        if not size:
            return
        local = self.optimizer.get_local_fp32_param
        tensors = {WEIGHT: local(parameter)[:size]}
        for key in self._keys():
            tensors[key] = local(parameter, key)[:size]
        yield Fragment(name, tuple(parameter.ds_shape), start, tensors)

    def fill(self, name: str, parameter: Any, source: Source) -> None:
        start, size, padded = self._range(parameter)
        for key in (WEIGHT, *self._keys()):
            value = torch.zeros(padded)
            if size:
                value[:size] = source.read(name, key, start, size)
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


def _tensors(owner: Any, state: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What an optimizer's state holds for each element of a parameter."""
    for key, value in state.items():
        if torch.is_tensor(value) and value.dim() and value.shape == owner.shape:
            yield key, value


def _scalars(owner: Any, state: dict[str, Any]) -> dict[str, float]:
    """The rest of the state: numbers."""
    tensors = {key for key, _ in _tensors(owner, state)}
    return {key: float(value) for key, value in state.items() if key not in tensors and value is not None}


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
