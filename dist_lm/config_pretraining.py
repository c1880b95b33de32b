"""The sections of the pretraining tasks.

Enters: YAML values.  Leaves: frozen settings.  Promises: values that contradict each other are refused.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from dist_lm.config_section import InnerShare, Section, Share, refuse

_ROUNDING = 1e-9
"""Slack for shares that a person wrote in decimal, such as 0.7 + 0.3."""
Span = Annotated[float, Field(ge=1.0)]
Smoothing = Annotated[float, Field(ge=0.0, lt=1.0)]


class MlmTask(Section):
    name: Literal["mlm"]
    mask_probability: InnerShare = 0.15
    """Share of the ordinary tokens that become targets."""
    mask_unit: Literal["token", "word", "span"] = "token"
    """What is masked together: one token, all tokens of a word, or a stretch of tokens."""
    mean_span: Annotated[float, Field(ge=1.0, le=9.0)] = 3.8
    """mask_unit span only: mean length of a stretch, in tokens (geometric, at most 10)."""
    mask_share: Share = 0.8
    """Share of the targets that the model sees as the mask token."""
    random_share: Share = 0.1
    """Share of the targets that the model sees as a random token; the rest it sees unchanged."""
    pair: Literal["nsp", "sop", "none"] = "nsp"
    """What is also learned about the two segments of a row: whether the second follows the first (NSP),
    whether they stand in their order (SOP), or nothing.  Data of kind `tokens` has no segments: `none`."""
    packing: Literal["auto"] | bool = "auto"
    """Samples share rows, so that little is padding; a token attends to its own sample only, and the loss
    is the same.  auto: where the model allows it, and the log says so.  false: each has a row of its own."""

    @model_validator(mode="after")
    def _shares_fit(self) -> MlmTask:
        if self.mask_share + self.random_share > 1.0 + _ROUNDING:
            words = f"task.mask_share {self.mask_share} + task.random_share {self.random_share} are more than 1"
            refuse([(words, ("task.mask_share", "task.random_share"))])
        return self


class CausalLmTask(Section):
    name: Literal["causal_lm"]
    documents: Literal["auto", "isolated", "joined"] = "auto"
    """isolated: a token attends to its own document only, and positions begin anew with each document.
    joined: a row is one text.  auto: isolated where the model allows it, and the log says which."""
    label_smoothing: Smoothing = 0.0
    """Share of the target's probability that is spread over the whole vocabulary; training loss only."""
    head_chunk: PositiveInt = 1024
    """Targets whose logits exist at one time; with more targets the head is computed twice, to save memory."""


class SpanCorruptionTask(Section):
    name: Literal["span_corruption"]
    objective: Literal["span", "prefix"] = "span"
    """span: the decoder writes what sentinels stand for.  prefix: it goes on where the encoder's text ends."""
    noise_density: InnerShare = 0.15
    """objective span only: share of the tokens that sentinels stand for."""
    mean_span: Span = 3.0
    """objective span only: mean tokens that one sentinel stands for."""
    label_smoothing: Smoothing = 0.0
    """Share of the target's probability that is spread over the whole vocabulary; training loss only."""
    head_chunk: PositiveInt = 1024
    """Targets whose logits exist at one time; with more targets the head is computed twice, to save memory."""
