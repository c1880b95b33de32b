"""Which parts of a text a prediction rests on: integrated gradients of the embeddings, by Captum.

Enters: a model, one input, and the score to explain, such as a logit.  Leaves: a number for each token.
Promises: the numbers add up to the score less that of the baseline, but for `convergence_delta`; the
baseline is the same input with padding tokens in place of the text, its special tokens kept.

Source: Sundararajan et al. 2017, "Axiomatic attribution for deep networks".
Shapes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dist_lm.errors import ConfigError, EnvironmentFault

STEPS = (32, 128, 512)
"""Points of the path from the baseline to the input; more of them only where the sum does not close."""
_CLOSED = 0.01
"""Of the difference of the scores: a smaller gap is none."""
_SMALLEST_GAP = 1e-3


@dataclass(frozen=True)
class Part:
    """Some characters of a record, and the tokens that stand for them."""

    field: str
    start: int
    end: int
    text: str
    tokens: Sequence[int]
    """Places in the model input."""


@dataclass(frozen=True)
class Attribution:
    """What each token adds to a score."""

    values: list[float]
    score: float
    baseline_score: float
    convergence_delta: float
    """What the sum of the values lacks of the difference of the scores."""

    def told(self, target: str, parts: Sequence[Part]) -> dict[str, Any]:
        """JSON values; a part's number is the sum over its tokens."""
        return {
            "target": target,
            "score": self.score,
            "baseline_score": self.baseline_score,
            "convergence_delta": self.convergence_delta,
            "attributions": [
                {
                    "field": part.field,
                    "start": part.start,
                    "end": part.end,
                    "text": part.text,
                    "attribution": sum(self.values[place] for place in part.tokens),
                }
                for part in parts
            ],
        }


class Attributor:
    """Integrated gradients of one model."""

    def __init__(self, model: Any, pad_id: int, *, rows: int) -> None:
        """`rows`: points of the path in one forward pass.  EnvironmentFault without Captum, ConfigError for
        a model that reads its embeddings twice.
        """
        if model.config.is_encoder_decoder:
            raise ConfigError(
                f"{type(model).__name__} cannot be explained",
                where="--explain",
                why="Its encoder and its decoder share their embeddings, so that a token has no gradient of its own.",
                do="Leave --explain out.",
            )
        self._model, self._pad_id, self._rows = model, pad_id, rows
        self._method = _captum_method()

    def of(
        self, inputs: Mapping[str, Tensor], text_T: Sequence[bool], score_of: Callable[[Tensor], Tensor]
    ) -> Attribution:
        """`inputs`: of the model, one row.  `text_T`: which tokens are text, not special.  `score_of`: logits
        [B, ...] -> scores [B].
        """
        names = [name for name in inputs if name != "input_ids"]
        ids_1T = inputs["input_ids"]
        baseline_1T = torch.where(torch.tensor([list(text_T)], device=ids_1T.device), self._pad_id, ids_1T)

        def forward(ids_BT: Tensor, *others: Tensor) -> Tensor:
            return score_of(self._model(input_ids=ids_BT, **dict(zip(names, others, strict=True))).logits.float())

        others = tuple(inputs[name] for name in names)
        with torch.no_grad():
            score, baseline_score = (float(forward(ids, *others)) for ids in (ids_1T, baseline_1T))
        method = self._method(forward, self._model.get_input_embeddings())
        allowed = max(_CLOSED * abs(score - baseline_score), _SMALLEST_GAP)
        for steps in STEPS:
            values_1TH, delta = method.attribute(
                ids_1T,
                baselines=baseline_1T,
                additional_forward_args=others,
                n_steps=steps,
                internal_batch_size=self._rows,
                return_convergence_delta=True,
            )
            gap = float(delta)
            if abs(gap) <= allowed:
                break
        return Attribution(values_1TH.sum(dim=-1)[0].tolist(), score, baseline_score, gap)


def _captum_method() -> Any:
    try:
        from captum.attr import LayerIntegratedGradients
    except ImportError as error:
        raise EnvironmentFault(
            "attributions need the package captum", where="--explain", do="pip install 'dist-lm[explain]'"
        ) from error
    return LayerIntegratedGradients
