"""The predictor of a trained model's task.

Enters: a Trained model, and the task that the user names, if any.  Leaves: a Predictor.
Promises: a model of another task is refused by name.
"""

from __future__ import annotations

import torch

from dist_lm.errors import ConfigError
from dist_lm.predictors.base import PredictOptions, Predictor
from dist_lm.predictors.classification import ClassificationPredictor
from dist_lm.predictors.fill_mask import FillMaskPredictor
from dist_lm.predictors.generation import ContinuationPredictor, InstructionPredictor, Seq2SeqPredictor
from dist_lm.predictors.question_answering import QuestionAnsweringPredictor
from dist_lm.predictors.token_classification import TokenClassificationPredictor
from dist_lm.trained import (
    CAUSAL_LM,
    CLASSIFICATION,
    FILL_MASK,
    INSTRUCTION,
    QUESTION_ANSWERING,
    SEQ2SEQ,
    TOKEN_CLASSIFICATION,
    Trained,
)

PREDICTORS: dict[str, type[Predictor]] = {
    CLASSIFICATION: ClassificationPredictor,
    TOKEN_CLASSIFICATION: TokenClassificationPredictor,
    QUESTION_ANSWERING: QuestionAnsweringPredictor,
    SEQ2SEQ: Seq2SeqPredictor,
    FILL_MASK: FillMaskPredictor,
    CAUSAL_LM: ContinuationPredictor,
    INSTRUCTION: InstructionPredictor,
}
# A causal model can be used either way.
_ALIKE = {CAUSAL_LM, INSTRUCTION}


def predictor_for(trained: Trained, task: str | None, options: PredictOptions, device: torch.device) -> Predictor:
    """Raises ConfigError where the model's head is not for `task`."""
    wanted = task or trained.task
    if wanted not in PREDICTORS:
        raise ConfigError(f"task `{wanted}` is unknown", where="--task", do=f"Write one of {', '.join(PREDICTORS)}.")
    if wanted != trained.task and not {wanted, trained.task} <= _ALIKE:
        raise ConfigError(
            f"this is a model for {trained.task}, not for {wanted}",
            where=trained.where,
            why=f"Its class is {type(trained.model).__name__}.",
            do=f"Leave --task out, or name a model that was trained for {wanted}.",
        )
    return PREDICTORS[wanted](trained, options, device)
