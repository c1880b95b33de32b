"""The task that a configuration names.

Enters: the task section.  Leaves: a Task.  Promises: one place to add a task;
a task from outside is imported by its name, in every rank.
"""

from __future__ import annotations

from collections.abc import Callable

from dist_lm.config import (
    CausalLmTask,
    ClassificationTask,
    CustomTask,
    InstructionTask,
    MlmTask,
    QuestionAnsweringTask,
    Seq2SeqTask,
    SpanCorruptionTask,
    TokenClassificationTask,
)
from dist_lm.config import Task as TaskSettings
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.named_class import named_class
from dist_lm.tasks.base import Task
from dist_lm.tasks.causal_lm import CausalLanguageModelling
from dist_lm.tasks.classification import Classification
from dist_lm.tasks.instruction import InstructionTuning
from dist_lm.tasks.mlm import MaskedLanguageModelling
from dist_lm.tasks.question_answering import QuestionAnswering
from dist_lm.tasks.seq2seq import Seq2Seq
from dist_lm.tasks.span_corruption import SpanCorruption
from dist_lm.tasks.token_classification import TokenClassification


def build_task(settings: TaskSettings, tokenizer: Tokenizer, view: View, seed: int) -> Task:
    """Raises DataError where the data set is of another kind than the task reads, ConfigError where there
    is no such task."""
    match settings:
        case MlmTask():
            return MaskedLanguageModelling(settings, tokenizer, view, seed)
        case CausalLmTask():
            return CausalLanguageModelling(settings, tokenizer, view, seed)
        case SpanCorruptionTask():
            return SpanCorruption(settings, tokenizer, view, seed)
        case ClassificationTask():
            return Classification(settings, tokenizer, view, seed)
        case TokenClassificationTask():
            return TokenClassification(settings, tokenizer, view, seed)
        case QuestionAnsweringTask():
            return QuestionAnswering(tokenizer, view, seed)
        case Seq2SeqTask():
            return Seq2Seq(settings, tokenizer, view, seed)
        case InstructionTask():
            return InstructionTuning(settings, tokenizer, view, seed)
        case CustomTask():
            # Like ours, its constructor takes the settings before what Task itself takes.
            build: Callable[..., Task] = named_class(settings.implementation, Task, where="task.class")  # type: ignore[type-abstract]
            return build(settings, tokenizer, view, seed)
