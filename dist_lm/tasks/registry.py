"""The task that a configuration names.

Enters: the task section.  Leaves: a Task.  Promises: one place to add a task.
"""

from __future__ import annotations

from dist_lm.config import ClassificationTask, MlmTask
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.tasks.base import Task
from dist_lm.tasks.classification import Classification
from dist_lm.tasks.mlm import MaskedLanguageModelling


def build_task(settings: MlmTask | ClassificationTask, tokenizer: Tokenizer, view: View, seed: int) -> Task:
    """Raises DataError where the data set is of another kind than the task reads."""
    match settings:
        case MlmTask():
            return MaskedLanguageModelling(settings, tokenizer, view, seed)
        case ClassificationTask():
            return Classification(tokenizer, view, seed)
