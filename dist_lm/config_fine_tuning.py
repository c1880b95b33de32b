"""The task sections of fine-tuning.

Enters: values of the section `task`.  Leaves: one class a task, frozen.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from dist_lm.config_section import Section

ClassWeights = Literal["balanced"] | dict[str, PositiveFloat]
Smoothing = Annotated[float, Field(ge=0.0, lt=1.0)]


class ClassificationTask(Section):
    name: Literal["classification"]
    class_weights: ClassWeights = Field(default_factory=dict)
    """Label -> how much its rows weigh in the loss; others weigh 1.  balanced: all labels have the same share,
    rows / (labels x rows of the label), as in scikit-learn.  For one label a text."""
    label_smoothing: Smoothing = 0.0
    """Share of a target that is spread over all labels.  For one label a text."""


class TokenClassificationTask(Section):
    name: Literal["token_classification"]
    label_tokens: Literal["first", "all"] = "first"
    """Tokens of a word that are targets.  The first one always decides what is predicted."""
    class_weights: ClassWeights = Field(default_factory=dict)
    """Tag -> how much its words weigh in the loss; others weigh 1.  balanced: as for classification, by words."""
    label_smoothing: Smoothing = 0.0
    """Share of a target that is spread over all tags."""


class QuestionAnsweringTask(Section):
    name: Literal["question_answering"]


class Seq2SeqTask(Section):
    name: Literal["seq2seq"]
    label_smoothing: Smoothing = 0.0
    """Share of a target that is spread over the vocabulary."""


class InstructionTask(Section):
    name: Literal["instruction"]
    head_chunk: PositiveInt = 1024
    """Targets whose logits exist at one time; with more targets the head is computed twice, to save memory."""
