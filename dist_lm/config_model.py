"""The sections of the model and of its optimizer.

Enters: YAML values.  Leaves: frozen settings.  Promises: a key that would have no effect is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, model_validator

from dist_lm.config_section import Rule, Section, Share, refuse

Family = Literal["bert", "roberta", "modernbert", "gpt2", "llama", "t5"]
SHARED_ROWS_FAMILIES = ("gpt2", "llama")
"""Whose rows several ranks can share (`sequence_parallel_size`)."""
Size = Literal["tiny", "mini", "small", "base", "large", "1b", "7b"]


class LoraSection(Section):
    rank: NonNegativeInt = 0
    """Rank of the adapters; 0: no LoRA, all weights are trained."""
    alpha: PositiveFloat = 16.0
    """Adapters count alpha / rank times."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    targets: tuple[str, ...] = ()
    """Last parts of the names of the linear layers that get adapters; empty: all but the head."""
    train_too: tuple[str, ...] = ()
    """Last parts of the names of modules that are trained as a whole; a new head always is."""


class ModelSection(Section):
    weights: Path | None = Field(default=None, alias="from")
    """Hugging Face folder, or run folder (its newest checkpoint), whose weights the run starts from."""
    family: Family | None = None
    """Kind of a new model; empty: bert, gpt2 or t5, as the task needs."""
    size: Size = "mini"
    """Named size of a new model (docs/objectives.md has the table)."""
    config: Path | None = None
    """config.json of Hugging Face for a new model, instead of family and size."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of the Hugging Face config that replace those of the named size or of `config`."""
    resize_embeddings: bool = False
    """With `from`: give the model a row for each token of the tokenizer, new ones drawn from run.seed."""
    freeze: tuple[str, ...] = ()
    """Patterns of parameter names that are not trained, such as `*.embeddings.*`; needs `from`."""
    freeze_layers: NonNegativeInt = 0
    """Number of layers, from the embeddings up and with them, that are not trained; needs `from`."""
    lora: LoraSection = LoraSection()
    activation_checkpointing: bool = False
    """Keep only the inputs of layers, and compute the rest again in the backward pass: less memory."""
    compile: bool = False
    """Compile the layers with torch.compile at their first use; not at ZeRO stage 3.  Where no compiler
    works the model trains as it is, and the log says so."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Implementation of attention; auto: transformers' choice for the model."""

    @model_validator(mode="after")
    def _keys_have_effect(self) -> ModelSection:
        refuse(list(self._broken()))
        return self

    @property
    def trains_a_part(self) -> bool:
        """Whether some weights of `from` stay as they are."""
        return bool(self.freeze or self.freeze_layers or self.lora.rank)

    def _broken(self) -> Iterator[Rule]:
        if self.trains_a_part and self.weights is None:
            yield (
                "freezing and LoRA need model.from: weights that are neither trained now nor before mean nothing",
                ("model.freeze", "model.freeze_layers", "model.lora.rank", "model.from"),
            )
        if self.lora.rank and (self.freeze or self.freeze_layers):
            yield (
                "model.freeze and model.freeze_layers have no effect with model.lora: only adapters are trained",
                ("model.freeze", "model.freeze_layers", "model.lora.rank"),
            )
        if self.resize_embeddings and self.weights is None:
            yield (
                "model.resize_embeddings has no effect on a new model: it fits the tokenizer",
                ("model.resize_embeddings",),
            )
        if self.config is not None and self.family is not None:
            yield "model.family has no effect beside model.config", ("model.family", "model.config")
        if self.config is not None and self.weights is not None:
            yield "model.config has no effect beside model.from", ("model.config", "model.from")


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
    name: Literal["adamw", "nadam", "sgd"] = "adamw"
    """adamw and nadam decay weights apart from the gradient, sgd within it."""
    lr: PositiveFloat
    """Peak learning rate."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """The learning rate of each layer as a share of that of the layer above it; 1: the same for all."""
    weight_decay: NonNegativeFloat = 0.01
    """Not applied to biases and normalisation weights."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """adamw and nadam."""
    eps: PositiveFloat = 1e-8
    """adamw and nadam."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """sgd."""
    clip: NonNegativeFloat = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    schedule: ScheduleSection = ScheduleSection()

    @model_validator(mode="after")
    def _keys_have_effect(self) -> OptimSection:
        idle = {"sgd": ("betas", "eps")}.get(self.name, ("momentum",))
        refuse(
            [
                (f"optim.{key} has no effect with optim.name={self.name}", (f"optim.{key}", "optim.name"))
                for key in idle
                if getattr(self, key) != type(self).model_fields[key].default
            ]
        )
        return self
