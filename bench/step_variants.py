"""The loops that bench/step.py compares: bare PyTorch, DDP, DeepSpeed as it comes, dist_lm.

Enters: a task, its model's section, prepared steps, the ranks.  Leaves: for each variant a function
that does step number N.  All of them begin with the same weights and take the same rows; with
`head="masked"` the bare loops compute logits where dist_lm does, so that the work is equal.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from step_data import Step

LR, CLIP, DECAY = 1e-3, 1.0, 0.01
Run = Callable[[int], None]


@dataclass(frozen=True)
class Scene:
    """What all variants of one process group share."""

    task: Any
    model: dict[str, Any]
    steps: list[Step]
    ranks: Any
    micro_rows: int
    """Samples of a micro-batch on one rank."""

    @property
    def accumulation(self) -> int:
        return len(self.steps[0].micro_batches)

    @property
    def global_rows(self) -> int:
        return self.micro_rows * self.accumulation * self.ranks.world_size

    def at(self, number: int) -> Step:
        return self.steps[number % len(self.steps)]

    def new_model(self) -> Any:
        from dist_lm.config import ModelSection

        return self.task.build_model(ModelSection(**self.model))

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        from dist_lm.config import OptimSection
        from dist_lm.parameters import groups

        return torch.optim.AdamW(groups(model, OptimSection(lr=LR, weight_decay=DECAY)), lr=LR, fused=True)


def dense_inputs(task: Any, micro_batch: Any) -> dict[str, Any]:
    """The micro-batch as a plain Hugging Face model takes it."""
    ids_BT = micro_batch.inputs["input_ids"]
    if "mlm" not in task.objectives:
        return {"input_ids": ids_BT, "labels": ids_BT}
    inputs = {name: micro_batch.inputs[name] for name in ("input_ids", "token_type_ids")}
    inputs["attention_mask"] = micro_batch.inputs.get("attention_mask", torch.ones_like(ids_BT))
    labels = torch.full(ids_BT.shape, -100)
    labels.view(-1)[micro_batch.inputs["masked_positions"]] = micro_batch.inputs["masked_labels"]
    return {**inputs, "labels": labels, "next_sentence_label": micro_batch.inputs["pair_labels"]}


def plain_head(scene: Scene) -> Run:
    """The loop that a person would write around a model of Hugging Face; logits at every position."""
    model = scene.new_model().train()
    optimizer = scene.optimizer(model)
    dense = [[dense_inputs(scene.task, part) for part in step.micro_batches] for step in scene.steps]

    def run(number: int) -> None:
        parts = dense[number % len(dense)]
        for part in parts:
            (model(**part).loss / len(parts)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return run


def bare(scene: Scene, *, ddp: bool = False, bf16: bool = False) -> Run:
    """The same loop with the loss of dist_lm's task; `ddp`: gradients averaged by DDP, once a step."""
    from dist_lm.tasks.base import TaskModule

    module = TaskModule(scene.new_model(), scene.task).train()
    optimizer = scene.optimizer(module)
    forward: Any = module
    if ddp:
        forward = torch.nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)
    world_size = scene.ranks.world_size if ddp else 1

    def run(number: int) -> None:
        step = scene.at(number)
        for index, part in enumerate(step.micro_batches):
            waits = ddp and index < len(step.micro_batches) - 1
            with forward.no_sync() if waits else contextlib.nullcontext():
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    sums = forward(**part.inputs)
                    loss = sum(sums[f"{name}_loss"] * (world_size / count) for name, count in step.targets.items())
                loss.backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return run


def deepspeed_as_it_comes(scene: Scene, *, stage: int) -> Run:
    """DeepSpeed with its own defaults, and the loss of dist_lm's task."""
    import deepspeed

    from dist_lm.tasks.base import TaskModule

    module = TaskModule(scene.new_model(), scene.task).train()
    settings = {
        "train_micro_batch_size_per_gpu": scene.micro_rows,
        "gradient_accumulation_steps": scene.accumulation,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "zero_optimization": {"stage": stage},
    }
    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    optimizer = scene.optimizer(module)
    engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)
    factor = scene.ranks.world_size * scene.accumulation

    def run(number: int) -> None:
        step = scene.at(number)
        for part in step.micro_batches:
            sums = engine(**part.inputs)
            engine.backward(sum(sums[f"{name}_loss"] * (factor / count) for name, count in step.targets.items()))
            engine.step()

    return run


def dist_lm_engine(scene: Scene, *, stage: int, precision: str = "fp32", compiled: bool = False) -> Run:
    """dist_lm as a run has it by default, at a ZeRO stage."""
    from dist_lm.config import RunConfig
    from dist_lm.deepspeed_config import resolve
    from dist_lm.engine import Engine

    model = scene.new_model()
    config = RunConfig.model_validate(
        {
            "task": {"name": "mlm"},
            "data": {"train": "data", "tokenizer": "tokenizer"},
            "batch": {"global": scene.global_rows, "micro": scene.micro_rows},
            "optim": {"lr": LR, "clip": CLIP, "weight_decay": DECAY},
            "run": {"dir": "run", "steps": 1},
            "zero": stage,
            "precision": precision,
        }
    )
    resolved = resolve(
        config,
        world_size=scene.ranks.world_size,
        micro_rows=scene.micro_rows,
        micro_steps=scene.accumulation,
        hidden_size=model.config.hidden_size,
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
    )
    engine = Engine(
        model,
        scene.task,
        optim=config.optim,
        deepspeed_settings=resolved.settings,
        ranks=scene.ranks,
        seed=1,
        compiled=compiled,
    )

    def run(number: int) -> None:
        step = scene.at(number)
        engine.step(step.micro_batches, global_targets=step.targets, learning_rate=LR, position=number)

    return run


TUNED = "zero1_bf16_packed"


def packs(name: str) -> bool:
    """Whether the samples of a variant share rows."""
    return name == "tuned" or "packed" in name.split("_")


def build(scene: Scene, name: str) -> Run:
    """A variant by its name: bare, bare_again, plain_head, ddp, deepspeedN, zeroN; _bf16, _compiled and _packed
    behind it; tuned."""
    first, *options = (TUNED if name == "tuned" else name).split("_")
    if name == "plain_head":
        return plain_head(scene)
    if first in ("bare", "ddp"):
        return bare(scene, ddp=first == "ddp", bf16="bf16" in options)
    if first.startswith("deepspeed"):
        return deepspeed_as_it_comes(scene, stage=int(first[-1]))
    precision = "bf16" if "bf16" in options else "fp32"
    return dist_lm_engine(scene, stage=int(first[-1]), precision=precision, compiled="compiled" in options)
