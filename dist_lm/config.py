"""RunConfig: everything that one run is told, frozen and checked at birth.

Enters: plain values (config_files.py reads them from YAML and overrides).  Leaves: a RunConfig.
Promises: unknown keys are refused; a RunConfig that exists is consistent.  Relative paths are kept
as they are: they count from the working directory, not from the YAML file.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from dist_lm.config_custom import CustomTask
from dist_lm.config_data import CacheSection, DataSection, SourceSpec, StageSpec, holds_secret
from dist_lm.config_fine_tuning import (
    ClassificationTask,
    InstructionTask,
    QuestionAnsweringTask,
    Seq2SeqTask,
    TokenClassificationTask,
)
from dist_lm.config_model import SHARED_ROWS_FAMILIES, LoraSection, ModelSection, OptimSection, ScheduleSection
from dist_lm.config_pretraining import CausalLmTask, MlmTask, SpanCorruptionTask
from dist_lm.config_ray import RaySection
from dist_lm.config_run import BatchSection, BestSection, EarlyStopSection, RunSection
from dist_lm.config_section import Rule, Section, refuse

__all__ = [
    "SHARED_ROWS_FAMILIES",
    "BatchSection",
    "BestSection",
    "CacheSection",
    "CausalLmTask",
    "ClassificationTask",
    "CustomTask",
    "DataSection",
    "EarlyStopSection",
    "InstructionTask",
    "LoraSection",
    "MlmTask",
    "ModelSection",
    "OptimSection",
    "QuestionAnsweringTask",
    "RunConfig",
    "RunSection",
    "ScheduleSection",
    "Section",
    "Seq2SeqTask",
    "SourceSpec",
    "SpanCorruptionTask",
    "StageSpec",
    "Task",
    "TokenClassificationTask",
]


Task = Annotated[
    MlmTask
    | CausalLmTask
    | SpanCorruptionTask
    | ClassificationTask
    | TokenClassificationTask
    | QuestionAnsweringTask
    | Seq2SeqTask
    | InstructionTask
    | CustomTask,
    Field(discriminator="name"),
]

_SHARED_ROWS_TASKS = ("causal_lm", "instruction")


class RunConfig(Section):
    task: Task
    model: ModelSection = ModelSection()
    data: DataSection
    batch: BatchSection
    optim: OptimSection
    run: RunSection
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16 and fp16 keep fp32 master weights; fp16 has a loss scale, which is part of the checkpoint."""
    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage; auto takes the DeepSpeed file's stage, or 1 without a file."""
    sequence_parallel_size: PositiveInt = 1
    """Ranks that share each row, for long rows: each holds a part of its places and, within attention, a part of
    the heads (DeepSpeed Ulysses); causal_lm and instruction with GPT-2 and Llama."""
    deepspeed: Path | None = None
    """DeepSpeed JSON with the settings that are DeepSpeed's own (ds_configs/)."""
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        refuse(list(_broken_rules(self)))
        return self


def _broken_rules(config: RunConfig) -> Iterator[Rule]:
    """Every rule over two sections."""
    batch, run, schedule = config.batch, config.run, config.optim.schedule
    if batch.micro_rows != "auto" and batch.micro_rows > batch.global_rows:
        yield (
            f"batch.micro {batch.micro_rows} is larger than batch.global {batch.global_rows}",
            ("batch.micro", "batch.global"),
        )
    if schedule.warmup_steps + schedule.decay_steps > run.steps:
        shown = f"optim.schedule.warmup_steps {schedule.warmup_steps} + decay_steps {schedule.decay_steps}"
        yield (
            f"{shown} are more than run.steps {run.steps}",
            ("optim.schedule.warmup_steps", "optim.schedule.decay_steps", "run.steps"),
        )
    if schedule.decay_steps and schedule.kind != "wsd":
        yield (
            f"optim.schedule.decay_steps has no effect with kind {schedule.kind}: it belongs to wsd",
            ("optim.schedule.decay_steps", "optim.schedule.kind"),
        )
    elsewhere = ["run.checkpoints"] if run.checkpoints and holds_secret(run.checkpoints) else []
    for key in [*config.data.keys_with_secrets, *elsewhere]:
        # A configuration is shown, logged, and copied into the run folder.
        yield (
            f"{key} holds a URL with a password or a query string; credentials belong into the environment, "
            "~/.netrc, or the files of the storage's own tools",
            (key,),
        )
    steps = [stage.from_step for stage in config.data.stages]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        yield "data.stages begin at steps that do not grow", ("data.stages",)
    if steps and steps[-1] > run.steps:
        yield f"data.stages begin at step {steps[-1]}, after run.steps {run.steps}", ("data.stages", "run.steps")
    if steps and len(config.data.sources) < 2:
        yield "data.stages has no effect: data.train is not a mixture", ("data.stages", "data.train")
    if getattr(config.task, "class_weights", None) == "balanced" and len(config.data.sources) > 1:
        yield (
            "task.class_weights balanced is for one data set, data.train is a mixture; write the weights",
            ("task.class_weights", "data.train"),
        )
    if config.precision == "fp16" and config.zero == 0:
        yield "precision fp16 needs zero 1, 2 or 3: at stage 0 DeepSpeed does not clip", ("precision", "zero")
    if config.model.compile and config.zero == 3:
        yield (
            "model.compile needs zero 0, 1 or 2: stage 3 gathers weights between the parts of a layer",
            (
                "model.compile",
                "zero",
            ),
        )
    yield from _broken_sharing(config)
    for key in ("eval_every", "best", "early_stop"):
        if getattr(run, key) and not config.data.heldout:
            yield f"run.{key} has no effect without data.heldout", (f"run.{key}", "data.heldout")


def _broken_sharing(config: RunConfig) -> Iterator[Rule]:
    """What cannot be with rows that several ranks share."""
    size, key = config.sequence_parallel_size, "sequence_parallel_size"
    if size == 1:
        return
    if config.task.name not in _SHARED_ROWS_TASKS:
        tasks = " and ".join(_SHARED_ROWS_TASKS)
        yield f"{key} {size} has no meaning for {config.task.name}: it is for {tasks}", (key, "task.name")
    if config.model.family not in (None, *SHARED_ROWS_FAMILIES):
        families = " and ".join(SHARED_ROWS_FAMILIES)
        yield f"{key} {size} is for the families {families}, not {config.model.family}", (key, "model.family")
    if config.model.attention == "eager":
        yield f"{key} {size} needs model.attention auto or sdpa", (key, "model.attention")
    workers = config.ray.workers
    if workers is not None and (workers.min != workers.max or workers.min % size):
        # An elastic run may be left with any number of workers, and would end there.
        yield f"{key} {size} needs a fixed number of ray.workers that it divides", (key, "ray.workers")
