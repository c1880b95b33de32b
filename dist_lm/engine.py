"""DeepSpeed behind one call: step(micro_batches) -> StepResult.

Enters: a model, the resolved DeepSpeed settings, micro-batches.  Leaves: updated weights and sums
over targets.  Promises: the gradient is that of the sum of the losses divided by the number of
targets over all ranks and micro-batches; how the batch was divided changes nothing but rounding.
"""

from __future__ import annotations

import contextlib
import copy
import io
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dist_lm import driven
from dist_lm.compiled import compile_layers
from dist_lm.config import OptimSection
from dist_lm.data.order import keyed_hash
from dist_lm.errors import EnvironmentFault
from dist_lm.gradients import GradientReduction
from dist_lm.parameters import groups
from dist_lm.ranks import Ranks
from dist_lm.tasks.base import MicroBatch, Task, TaskModule

if TYPE_CHECKING:
    from dist_lm.whole_weights import WholeWeights

Sums = dict[str, Tensor]
_DROPOUT = 201
_OF_A_BUILD = ("building extension", "failed to build", "Ninja is required")
"""What torch and DeepSpeed say where an op cannot be compiled."""
_NORM_EPSILON = 1e-6
"""As in torch and DeepSpeed: a norm is never divided by zero."""


def _no_fault(_point: str) -> str:
    return ""


@dataclass
class StepResult:
    """What one step leaves behind.  Tensors stay on the device until somebody reads them."""

    sums: Sums
    """This rank's `<objective>_loss` and `<objective>_correct` sums."""
    grad_norm: float | Tensor
    """Global gradient norm before clipping."""
    applied: bool | Tensor = True
    """False where the gradient was not finite, so that no rank changed its weights."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Host time of `forward`, `backward` and `optimizer`."""


class Engine:
    """One model on all ranks, trained by DeepSpeed ZeRO."""

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        *,
        optim: OptimSection,
        deepspeed_settings: Mapping[str, Any],
        ranks: Ranks,
        seed: int,
        compiled: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        import deepspeed

        # It prints a line about its op, on each rank at each start.
        with contextlib.redirect_stdout(io.StringIO()):
            deepspeed.init_distributed(dist_backend="gloo" if ranks.device.type == "cpu" else "nccl", verbose=False)
        driven.spare_host_work()
        self.ranks = ranks
        self.seed = seed
        self._clock = clock
        module = TaskModule(model, task)
        # transformers hands out loaded weights in evaluation mode: without dropout.
        module.to(ranks.device).train()
        if compiled:
            compile_layers(model)
        parameter_groups = groups(module, optim)
        settings = copy.deepcopy(dict(deepspeed_settings))
        driven.require_precision(settings)
        own_reduction = driven.reduces_itself(settings)
        # In fp32 at stage 0 DeepSpeed clips without telling the norm, so the engine clips itself.
        self._own_clip = optim.clip if own_reduction or driven.is_plain(settings) else None
        if self._own_clip is not None:
            settings["gradient_clipping"] = 0.0
        accumulate_in = driven.hand_over_reduction(settings) if own_reduction else None
        gathers_once = driven.gathers_once(settings, sum(p.numel() for p in module.parameters()))
        if gathers_once:
            driven.hand_over_gathering(settings)
        try:
            optimizer = driven.build_optimizer(optim, parameter_groups, settings)
            self._engine, *_ = deepspeed.initialize(
                model=module,
                optimizer=optimizer,
                config=settings,
                dist_init_required=False,
            )
        except (RuntimeError, OSError) as error:
            if not any(words in str(error) for words in _OF_A_BUILD):
                raise
            raise EnvironmentFault(
                "a DeepSpeed op could not be built",
                # DeepSpeed's Adam puts its own words before those of the builder.
                why="\n".join(str(told).splitlines()[0] for told in (error, error.__cause__) if told),
                do="Install a C++ compiler, and for a GPU the CUDA toolkit of torch's version; `dist-lm doctor -c X`.",
            ) from error
        self.stage = int(self._engine.zero_optimization_stage())
        self._reduction: GradientReduction | None = None
        if own_reduction:
            self._reduction = GradientReduction(
                self._engine.optimizer,
                [*module.parameters()],
                rank=ranks.rank,
                world_size=ranks.world_size,
                bucket_elements=int(self._engine.zero_reduce_bucket_size()),
                overlap=driven.overlaps(settings),
                keep_whole=self.stage == 1,
                accumulate_in=accumulate_in,
            )
            self._engine.set_gradient_accumulation_boundary(True)
        self._backward_is_torchs = own_reduction or (self._own_clip is not None and ranks.world_size == 1)
        """DeepSpeed has no part in it: its stage 0 would copy all gradients for a reduction, of one rank too."""
        self._fused: Any = None
        """The optimizer of torch, where its kernel clips and skips by what stands on the device."""
        if self._own_clip is not None and optim.name == "adamw":
            self._fused = optimizer
        self._weights: WholeWeights | None = None
        if gathers_once:
            from dist_lm.whole_weights import WholeWeights

            bucket = int(self._engine.zero_prefetch_bucket_size())
            self._weights = WholeWeights(module, self._engine.optimizer, bucket_elements=bucket)
        self._groups = [(group["lr_scale"], group["weight_decay"]) for group in parameter_groups]
        self._undo_first_step()
        self.check_groups()

    def _undo_first_step(self) -> None:
        """At stage 0 in bf16 DeepSpeed makes the optimizer's state by a step with zero gradients.

        That step is counted and decays the weights: the run would begin at step 1.
        """
        wrapper = self._engine.optimizer
        for lows, highs in zip(getattr(wrapper, "fp16_groups", ()), getattr(wrapper, "fp32_groups", ()), strict=False):
            for low, high in zip(lows, highs, strict=True):
                high.data.copy_(low.data)
                wrapper.optimizer.state.pop(high, None)

    def check_groups(self) -> None:
        """Rates and decays are those that were set: DeepSpeed has been seen to copy one group's to all."""
        groups = [(group["lr_scale"], group["weight_decay"]) for group in self._engine.optimizer.param_groups]
        if groups != self._groups:
            raise AssertionError(f"parameter groups (rate scale, weight decay) are {groups}, not {self._groups}")

    @property
    def deepspeed_engine(self) -> Any:
        """For checkpoint/fragments.py, which knows where DeepSpeed keeps its state."""
        return self._engine

    @property
    def module(self) -> TaskModule:
        module: TaskModule = self._engine.module
        return module

    def step(
        self,
        micro_batches: Sequence[MicroBatch],
        *,
        global_targets: Mapping[str, float],
        learning_rate: float,
        position: int,
        fault: Callable[[str], str] = _no_fault,
    ) -> StepResult:
        """One optimizer update.

        `global_targets`: targets of each objective over all ranks and micro-batches.
        `position`: first row of the global batch; with the rank it seeds dropout, so that a resumed
        run draws the same masks and no generator has to be saved.
        `fault`: faults.py's places inside a step, for tests.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        # DeepSpeed averages gradients over ranks; the loss is multiplied by their number first.
        factor = 1 if self._reduction is not None else self.ranks.world_size
        weights = {name: factor / max(count, 1.0) for name, count in global_targets.items()}
        seconds = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
        totals: Sums = {}
        began = self._clock()
        with self._one_reduction(len(micro_batches)) as before_micro_step:
            for index, micro_batch in enumerate(micro_batches):
                before_micro_step(index)
                seed = keyed_hash(self.seed, _DROPOUT, position, index, self.ranks.rank)
                torch.manual_seed(int(seed) >> 1)
                sums = self._forward(micro_batch)
                fault("in_forward")
                loss: Any = sum(sums[f"{name}_loss"] * weight for name, weight in weights.items())
                if fault("in_loss") == "nan":
                    loss = loss * float("nan")
                forwarded = self._clock()
                seconds["forward"] += forwarded - began
                self._backward(loss)
                began = self._clock()
                seconds["backward"] += began - forwarded
                for name, value in sums.items():
                    totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        fault("before_optimizer")
        grad_norm, applied = self._update()
        seconds["optimizer"] = self._clock() - began
        return StepResult(totals, grad_norm, applied, seconds)

    def _forward(self, micro_batch: MicroBatch) -> Sums:
        # DeepSpeed's own forward prepares its own backward.
        module = self.module if self._backward_is_torchs else self._engine
        if self._weights is not None:
            self._weights.begin()
        sums: Sums = module(**micro_batch.to(self.ranks.device).inputs)
        if self._weights is not None:
            self._weights.finish()
        return sums

    def _backward(self, loss: Any) -> None:
        if self._backward_is_torchs:
            loss.backward()
        else:
            self._engine.backward(loss, scale_wrt_gas=False)

    def _update(self) -> tuple[float | Tensor, bool | Tensor]:
        """Gradient norm before clipping, and whether the gradient was finite and the weights have changed."""
        if self._own_clip is None:
            self._engine.step()
            if self._weights is not None:
                self._weights.released()
            norm = self._engine.get_global_grad_norm()
            return 0.0 if norm is None else norm, bool(self._engine.was_step_applied())
        norm = self._norm()
        finite: bool | Tensor = torch.isfinite(norm)
        if self._fused is None:
            finite = bool(finite)
            if finite:
                self._clip(float(norm))
        else:
            # Its kernel divides gradients by the one and does nothing where the other is 1: the host waits for neither.
            clip = self._own_clip
            self._fused.grad_scale = ((norm + _NORM_EPSILON) / clip).clamp(min=1.0) if clip else None
            self._fused.found_inf = (~torch.isfinite(norm)).float()
        self._apply(skip=finite is False)
        return norm, finite

    def _apply(self, *, skip: bool) -> None:
        """The optimizer's step; `skip`: the host knows that there is none."""
        if self._reduction is None:
            if skip:
                # Without gradients the optimizer does nothing.
                self.module.zero_grad(set_to_none=True)
            self._engine.step()
        else:
            if not skip:
                self._reduction.hand_over()
                self._engine.step()
            self._reduction.release()

    def _norm(self) -> Tensor:
        if self._reduction is not None:
            return self._reduction.norm()
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def _clip(self, norm: float) -> None:
        if not self._own_clip or norm <= self._own_clip:
            return
        factor = self._own_clip / (norm + _NORM_EPSILON)
        if self._reduction is not None:
            self._reduction.scale(factor)
        else:
            torch._foreach_mul_([p.grad for p in self.module.parameters() if p.grad is not None], factor)

    @torch.no_grad()
    def evaluate(self, micro_batch: MicroBatch) -> Sums:
        """Sums of one micro-batch without dropout; every rank must call it equally often."""
        self._engine.eval()
        try:
            if self._weights is not None:
                self._weights.begin()
            sums: Sums = self._engine(**micro_batch.to(self.ranks.device).inputs)
            if self._weights is not None:
                self._weights.release()
        finally:
            self._engine.train()
        return sums

    @contextlib.contextmanager
    def _one_reduction(self, micro_steps: int) -> Iterator[Callable[[int], None]]:
        """Gradients of all micro-batches are reduced once, where the stage allows it.

        DeepSpeed's own stage 2 would reduce after every micro-batch; coalescing keeps local gradients
        for one step and saves that traffic.  Stage 3 is chosen for its memory, so it goes on reducing
        each time.
        """
        reduction = self._reduction
        offload = self._engine.zero_optimization() and self._engine.zero_cpu_offload()
        if reduction is not None:
            yield lambda index: reduction.begin(index, micro_steps)
            reduction.finish()
        elif self.stage == 2 and micro_steps > 1 and not offload:
            with self._engine.coalesce_grad_reduction():
                yield lambda index: None
            self._engine.set_gradient_accumulation_boundary(True)
        else:
            yield lambda index: self._engine.set_gradient_accumulation_boundary(index == micro_steps - 1)

    def close(self) -> None:
        self._engine.destroy()
