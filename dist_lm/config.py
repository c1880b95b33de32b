"""RunConfig: everything that one run is told, frozen and checked at birth.

Enters: plain values (config_files.py reads them from YAML and overrides).  Leaves: a RunConfig.
Promises: unknown keys are refused; a RunConfig that exists is consistent.  Relative paths are kept
as they are: they count from the working directory, not from the YAML file.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Rule = tuple[str, tuple[str, ...]]
"""A broken rule in words, and the dotted keys that it is about."""
_ROUNDING = 1e-9
"""Slack for shares that a person wrote in decimal, such as 0.7 + 0.3."""


class Section(BaseModel):
    """One section of the YAML: frozen, unknown keys forbidden."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def _refuse(broken: list[Rule]) -> None:
    """Raise all broken rules at once; config_files.py adds file and line of the keys."""
    if broken:
        text = "; ".join(words for words, _ in broken)
        raise PydanticCustomError("rules", "{text}", {"text": text, "rules": broken})


class RunSection(Section):
    dir: Path
    """Folder of this run: checkpoints, metrics, logs.  The same folder goes on where it was."""
    steps: PositiveInt
    """Optimizer updates in the whole run."""
    seed: Seed = 0
    """Decides weights, data order, masks and dropout."""
    log_every: PositiveInt = 10
    """Steps between two metric records."""
    eval_every: NonNegativeInt = 0
    """Steps between two evaluations; 0: only at the end."""
    save_every: PositiveInt = 500
    """Steps between two checkpoints.  The last step is always saved."""
    keep: PositiveInt = 3
    """Checkpoints kept; older ones are removed once a newer one is verified."""
    allow_change: tuple[str, ...] = ()
    """Dotted keys that may differ from those the run folder was begun with."""


class MlmTask(Section):
    name: Literal["mlm"]
    mask_probability: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the ordinary tokens that become targets."""
    mask_unit: Literal["token", "word"] = "token"
    """What is masked together: one token, or all tokens of a word."""
    mask_share: Share = 0.8
    """Share of the targets that the model sees as the mask token."""
    random_share: Share = 0.1
    """Share of the targets that the model sees as a random token; the rest it sees unchanged."""
    next_sentence: bool = True
    """Also learn to tell whether the second segment follows the first (NSP)."""

    @model_validator(mode="after")
    def _shares_fit(self) -> MlmTask:
        if self.mask_share + self.random_share > 1.0 + _ROUNDING:
            words = f"task.mask_share {self.mask_share} + task.random_share {self.random_share} are more than 1"
            _refuse([(words, ("task.mask_share", "task.random_share"))])
        return self


class ClassificationTask(Section):
    name: Literal["classification"]


Task = Annotated[MlmTask | ClassificationTask, Field(discriminator="name")]


class ModelSection(Section):
    weights: Path | None = Field(default=None, alias="from")
    """Hugging Face folder, or run folder, whose weights the run starts from."""
    size: Literal["tiny", "mini", "small", "base", "large"] = "mini"
    """Named BERT size, used where `from` is empty."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the Hugging Face config that replace those of the named size."""


class SourceSpec(BaseModel):
    """One data set of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    path: str
    """Prepared data set (a folder with manifest.json)."""
    weight: NonNegativeFloat = 1.0
    """Share of the tokens of training, before it is divided by the sum of all weights."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$")] = ""
    """What data.stages and the metrics call it; by default the last folder that is not `train`."""


class StageSpec(BaseModel):
    """Weights that change during the run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    from_step: Annotated[int, Field(ge=2)]
    """The first step with these weights; steps are counted from 1."""
    weights: dict[str, NonNegativeFloat]
    """New weights by source; sources that are not named keep theirs."""


def _read_sources(value: Any) -> Any:
    """A location, or a list of locations and sections; with the place in the list of whatever is wrong."""
    if not isinstance(value, list | tuple) or not value:
        _refuse([] if isinstance(value, str) else [("data.train is a location or a list of sources", ("data.train",))])
        return value
    items = [{"path": item} if isinstance(item, str) else item for item in value]
    return tuple(_read_items(SourceSpec, items, "data.train"))


def _read_heldout(value: Any) -> Any:
    several = isinstance(value, dict) and value and all(isinstance(item, str) for item in value.values())
    if value is not None and not isinstance(value, str) and not several:
        _refuse([("data.heldout is a location, or several by name", ("data.heldout",))])
    return value


def _read_stages(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        _refuse([("data.stages is a list of sections with from_step and weights", ("data.stages",))])
    return tuple(_read_items(StageSpec, value, "data.stages"))


def _read_items(model: type[BaseModel], items: Any, key: str) -> Iterator[Any]:
    """The items of a list of sections; a mistake names the item and the key inside it."""
    for place, item in enumerate(items):
        try:
            yield model.model_validate(item)
        except ValidationError as error:
            mistakes = error.errors(include_url=False)
            names = ", ".join(model.model_fields)
            _refuse(
                [
                    (
                        f"{key}[{place}]: {'.'.join(map(str, found['loc'])) or 'item'}: {found['msg']} (keys: {names})",
                        (key,),
                    )
                    for found in mistakes
                ]
            )


class DataSection(Section):
    train: Annotated[str | tuple[SourceSpec, ...], BeforeValidator(_read_sources)]
    """Prepared data set (a folder with manifest.json), or a list of them to mix: `- {path: ..., weight: ...}`."""
    stages: Annotated[tuple[StageSpec, ...], BeforeValidator(_read_stages)] = ()
    """Steps at which the weights of the mixture change: `- {from_step: ..., weights: {NAME: ...}}`."""
    heldout: Annotated[str | dict[str, str] | None, BeforeValidator(_read_heldout)] = None
    """Prepared data set for evaluation, or several by name: `{NAME: PATH}`."""
    tokenizer: Path
    """Tokenizer folder; must be the one that the data sets were prepared with."""
    seq_len: PositiveInt | None = None
    """Tokens of a row, for data sets of kind `tokens`, which need it.  Other kinds were packed for a
    length when they were prepared."""
    lanes: PositiveInt = 16
    """Readers that go through the shards side by side (design note: data order)."""
    era: PositiveInt = 1024
    """Rows of a lane that are shuffled together."""

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """What `train` names, one data set or several."""
        return (SourceSpec(path=self.train),) if isinstance(self.train, str) else self.train

    @property
    def heldout_sets(self) -> dict[str, str]:
        """Location of each held-out set by name; the name of a single one is empty."""
        if isinstance(self.heldout, dict):
            return self.heldout
        return {"": self.heldout} if self.heldout else {}


class BatchSection(Section):
    global_rows: PositiveInt = Field(alias="global")
    """Rows that all ranks together train on in one step."""
    micro_rows: PositiveInt = Field(alias="micro")
    """Most rows that one rank sends through one forward pass."""


class ScheduleSection(Section):
    kind: Literal["constant", "linear", "cosine", "wsd"] = "linear"
    """Shape of the learning rate after warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps in which the learning rate rises linearly from 0."""
    final_share: Share = 0.0
    """Learning rate at the last step, as a share of `optim.lr`."""
    decay_steps: NonNegativeInt = 0
    """wsd only: steps of the final linear decay."""


class OptimSection(Section):
    name: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    """Peak learning rate."""
    weight_decay: NonNegativeFloat = 0.01
    """Not applied to biases and normalisation weights."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: ScheduleSection = ScheduleSection()


def _or_a_number(schema: dict[str, Any]) -> None:
    schema["anyOf"].append({"type": "integer", "minimum": 1})


class WorkerRange(Section):
    """How many workers: in YAML one number, or `{min: 4, max: 16}`."""

    min: PositiveInt
    """Fewest workers that the run may go on with."""
    max: PositiveInt
    """Most workers that the run grows to."""

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool):
            return {"min": given, "max": given}
        if not isinstance(given, dict | WorkerRange):
            _refuse([(f"ray.workers `{given}` is neither a number nor {{min: N, max: N}}", ("ray.workers",))])
        return given

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.min > self.max:
            _refuse([(f"ray.workers.min {self.min} is more than ray.workers.max {self.max}", ("ray.workers",))])
        return self


class RaySection(Section):
    """What the run asks of a Ray cluster; without effect under other launchers."""

    workers: WorkerRange | None = Field(default=None, json_schema_extra=_or_a_number)
    """Workers, one for each accelerator (or CPU): a number, or {min, max} to shrink and grow with the cluster.
    Empty: all that the cluster has at the start."""
    accelerator_type: str | None = None
    """Only GPUs of this type, such as A100 (Ray's name)."""
    resources_per_worker: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Resources that a worker takes; empty: {GPU: 1} where the cluster has GPUs, else {CPU: 1}."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """PACK: on few nodes; SPREAD: on many; STRICT_: only so."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have, such as {market: spot}."""
    resize_s: PositiveFloat = 60.0
    """With {min, max}: seconds between two looks for nodes that came; growing costs a restart."""


class RunConfig(Section):
    task: Task
    model: ModelSection = ModelSection()
    data: DataSection
    batch: BatchSection
    optim: OptimSection
    run: RunSection
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 keeps fp32 master weights."""
    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """ZeRO stage; auto takes the DeepSpeed file's stage, or 1 without a file."""
    deepspeed: Path | None = None
    """DeepSpeed JSON with the settings that are DeepSpeed's own (ds_configs/)."""
    ray: RaySection = RaySection()

    @model_validator(mode="after")
    def _sections_fit(self) -> RunConfig:
        _refuse(list(_broken_rules(self)))
        return self


def _broken_rules(config: RunConfig) -> Iterator[Rule]:
    """Every rule over two sections."""
    batch, run, schedule = config.batch, config.run, config.optim.schedule
    if batch.micro_rows > batch.global_rows:
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
    steps = [stage.from_step for stage in config.data.stages]
    if any(later <= earlier for earlier, later in pairwise(steps)):
        yield "data.stages begin at steps that do not grow", ("data.stages",)
    if steps and steps[-1] > run.steps:
        yield f"data.stages begin at step {steps[-1]}, after run.steps {run.steps}", ("data.stages", "run.steps")
    if steps and len(config.data.sources) < 2:
        yield "data.stages has no effect: data.train is not a mixture", ("data.stages", "data.train")
    if run.eval_every and not config.data.heldout:
        yield (
            "run.eval_every has no effect without data.heldout",
            ("run.eval_every", "data.heldout"),
        )
