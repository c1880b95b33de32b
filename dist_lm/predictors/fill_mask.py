"""Guesses for the masked places of a text.

Enters: `text` with mask tokens.  Leaves: `masks`, for each place the likeliest tokens.
Promises: the mask token counts as such wherever the text spells it; all else is text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Unusable
from dist_lm.errors import ConfigError
from dist_lm.predictors.base import Prediction, Predictor
from dist_lm.scores.base import Counts, MetricSet
from dist_lm.tasks.base import encoder_arguments


class FillMaskPredictor(Predictor):
    fields = {"text": "a text with mask tokens"}

    def clean(self, fields: Fields) -> list[int]:
        text = checked.text(fields, "text")
        mask = self.tokenizer.decode([self.tokenizer.mask_id])
        parts = text.split(mask)
        if len(parts) == 1:
            raise Unusable(f"there is no {mask} in field 'text'")
        frame = self.tokenizer.frame()
        ids = list(frame.prefix)
        for number, part in enumerate(self.tokenizer.encode_batch(parts)):
            ids += [*([self.tokenizer.mask_id] if number else []), *part]
        ids = [*ids, *frame.suffix]
        if len(ids) > self.seq_len:
            raise Unusable(f"the text has {len(ids)} tokens, and the model takes {self.seq_len}")
        return ids

    def predict(self, cleaned: Sequence[list[int]]) -> list[Prediction]:
        return self.in_batches(cleaned, len, self._forward)

    def _forward(self, rows: list[list[int]]) -> list[Prediction]:
        inputs = self.batch(rows, token_type_ids=[[0] * len(row) for row in rows])
        output = self.model(**encoder_arguments(self.model, inputs))
        # BERT's pretraining model has two heads, and names this one so.
        logits_BTV = output["prediction_logits"] if "prediction_logits" in output else output["logits"]
        predictions: list[Prediction] = []
        for row, ids in enumerate(rows):
            places = [place for place, token in enumerate(ids) if token == self.tokenizer.mask_id]
            shares_MV = torch.softmax(logits_BTV[row, places].float(), dim=-1)
            best = torch.topk(shares_MV, min(self.options.top_k, shares_MV.shape[1]), dim=-1)
            predictions.append({"masks": [self._guesses(*one) for one in zip(best.indices, best.values, strict=True)]})
        return predictions

    def _guesses(self, tokens: torch.Tensor, shares: torch.Tensor) -> list[dict[str, Any]]:
        return [
            {"token": self.tokenizer.decode([token]).strip(), "probability": share}
            for token, share in zip(tokens.tolist(), shares.tolist(), strict=True)
        ]

    def expected(self, fields: Fields) -> Any:
        raise self._no_metrics()

    def metric_set(self) -> MetricSet:
        raise self._no_metrics()

    def counts(self, metrics: MetricSet, prediction: Prediction, expected: Any) -> Counts:
        raise self._no_metrics()

    def _no_metrics(self) -> ConfigError:
        return ConfigError(
            "records say nothing about masks that could be judged",
            where=self.trained.where,
            do="Prepare the text and name it as data.heldout: training tells MLM loss and accuracy of it.",
        )
