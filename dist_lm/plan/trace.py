"""One micro-step without numbers: what it would allocate and compute.

Enters: a task, the model section, a micro-batch.  Leaves: bytes and FLOPs.
Promises: no memory for weights or activations is taken, whatever the model's size; the very code of
the step is traced - the task's loss, its masked or chunked head, recomputed activations - and nothing
is estimated but what kernels need for themselves.

The trace runs on fake tensors (torch's FakeTensorMode), which know shapes only.  Tasks try their head
and their attention on numbers when they meet a model: they meet a small one first, before they
make the micro-batch, which may depend on it.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import masking_utils

from dist_lm.config import ModelSection
from dist_lm.mesh import Mesh
from dist_lm.model_sizes import SIZES
from dist_lm.run_model import config_folder
from dist_lm.sequence_parallel import alone, share_rows
from dist_lm.tasks.base import MicroBatch, Task, TaskModule

_ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attn_pdrop", "attention_dropout")
"""With it the CPU keeps all weights of the attention; the kernels of a GPU keep none."""


@dataclass(frozen=True)
class MicroStep:
    """What one forward and backward pass of a micro-batch takes."""

    parameters: int
    """Trained."""
    frozen: int
    modules: int
    """That hold parameters themselves: ZeRO-3 gathers each."""
    activation_bytes: int
    """Most that exists at one time beside weights and gradients."""
    peak_with_gradients: int
    """Most that exists at one time beside weights, where gradients are kept as they are made."""
    flops: float
    """Forward and backward; recomputed activations count again."""
    tokens: int
    slots: int
    exchanged: int = 0
    """Numbers that a rank sends for each place of a forward pass, where ranks share rows."""
    exchanges: int = 0
    """Collectives of a forward pass that do so."""


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that exist, of those made under it."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen: dict[int, Any] = {x.untyped_storage()._cdata: None for x in known.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def gone(_: object) -> None:
            self._seen.pop(key, None)
            self.now -= size

        self._seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


def introduce(task: Task, section: ModelSection) -> ModelSection:
    """Let the task meet the architecture; the section that is traced, without weights.

    Raises ConfigError and DataError as building the model does.
    """
    if section.weights is not None:
        fields = {"weights": None, "config": config_folder(Path(section.weights)) / "config.json", "freeze": ()}
        section = section.model_copy(update={**fields, "freeze_layers": 0})
    with _unprepared(task), FakeTensorMode():
        family = task.build_model(section).config.model_type
    task.build_model(section.model_copy(update={"overrides": {**section.overrides, **_small(family)}}))
    return section


def trace(
    task: Task, section: ModelSection, micro_batch: MicroBatch, *, precision: str, on_gpu: bool, parts: int = 1
) -> MicroStep:
    """`section`: what `introduce` has said; `parts`: `sequence_parallel_size`, the micro-batch is one rank's part.

    Raises ConfigError where ranks cannot share the model's rows.
    """
    with _unprepared(task):
        return _trace(task, section, micro_batch, precision, on_gpu, parts)


@contextlib.contextmanager
def _unprepared(task: Task) -> Iterator[None]:
    """A task that tries nothing on its models: a fake one has no logits to compare."""
    vars(task)["prepare_for"] = lambda _: None
    try:
        yield
    finally:
        del vars(task)["prepare_for"]


def _small(family: str) -> dict[str, int]:
    """Overrides that make a model small: one layer, and narrow where we know how the family says that."""
    known = SIZES[family]["tiny"] if family in SIZES else {}
    narrow = {name: value for name, value in known.items() if type(value) is int and "layers" not in name}
    return {**narrow, "num_hidden_layers": 1}


def _trace(
    task: Task, section: ModelSection, micro_batch: MicroBatch, precision: str, on_gpu: bool, parts: int
) -> MicroStep:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]

    def passes(counter: Any, *, keep_gradients: bool) -> tuple[TaskModule, int]:
        """A forward and a backward pass under a counter; the module, and the bytes at their peak."""
        with mode:
            model = task.build_model(section)
            share_rows(model, Mesh(parts=parts), alone(parts))
            module = TaskModule(model, task).train()
            if on_gpu:
                _without_attention_dropout(module)
            _cast(module, dtype)
            inputs = {name: mode.from_tensor(value) for name, value in micro_batch.inputs.items()}
            if not keep_gradients:
                for parameter in module.parameters():
                    if parameter.requires_grad:
                        parameter.register_post_accumulate_grad_hook(_drop)  # type: ignore[no-untyped-call]
            live = _Live(module)
            # The counter of FLOPs keeps what a recomputing layer would let go: one of the two at a time.
            with _as_positions_say(inputs), counter or live:
                sums = module(**inputs)
                loss = sum(value for name, value in sums.items() if name.endswith("_loss"))
                del sums
                loss.backward()
        return module, live.peak

    _, activation_bytes = passes(None, keep_gradients=False)
    _, peak_with_gradients = passes(None, keep_gradients=True)
    counter = FlopCounterMode(display=False)
    module, _ = passes(counter, keep_gradients=False)
    trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    return MicroStep(
        parameters=sum(trained),
        frozen=sum(parameter.numel() for parameter in module.parameters()) - sum(trained),
        modules=sum(bool(child._parameters) for child in module.modules()),
        activation_bytes=activation_bytes,
        peak_with_gradients=peak_with_gradients,
        flops=float(counter.get_total_flops()),
        tokens=micro_batch.tokens,
        slots=micro_batch.slots,
        **(_exchanges(module.model.config, parts) if parts > 1 else {}),
    )


def _exchanges(config: Any, parts: int) -> dict[str, int]:
    """In each layer queries, keys and values go, and the result comes back; a rank keeps its own part."""
    heads = int(config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    moved = 2 * heads + 2 * int(getattr(config, "num_key_value_heads", heads))
    layers = int(config.num_hidden_layers)
    return {"exchanged": layers * moved * width * (parts - 1) // parts, "exchanges": 4 * layers}


@contextlib.contextmanager
def _as_positions_say(inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """A mask that keeps documents apart is made only where positions tell of several.

    transformers reads that from the numbers; where there are none it makes one, of the row's length
    squared, for each layer.
    """
    reads = masking_utils.find_packed_sequence_indices
    if "position_ids" not in inputs:
        masking_utils.find_packed_sequence_indices = lambda _: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = reads


def _drop(parameter: Tensor) -> None:
    parameter.grad = None


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Weights of another type; `Module.to` cannot exchange fake ones.  Tied weights stay tied."""
    done: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                cast = nn.Parameter(parameter.detach().to(dtype), requires_grad=parameter.requires_grad)
                child._parameters[name] = done.setdefault(id(parameter), cast)


def _without_attention_dropout(module: TaskModule) -> None:
    for child in module.modules():
        config = getattr(child, "config", None)
        for name in _ATTENTION_DROPOUT:
            if getattr(config, name, 0.0):
                setattr(config, name, 0.0)
            value = getattr(child, name, None)
            if isinstance(value, float):
                setattr(child, name, 0.0)
