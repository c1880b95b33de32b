"""Guesses for the masked places of a text.

Enters: `text` with mask tokens.  Leaves: `masks`, for each place the likeliest tokens; to be judged, a
text without masks, and its pseudo-perplexity.
Promises: the mask token counts as such wherever the text spells it; all else is text.  Pseudo-perplexity
is that of each token given all others, so it depends on no draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Unusable
from dist_lm.predictors.base import Prediction, Predictor
from dist_lm.scores.base import Counts, MetricSet
from dist_lm.scores.generated import LanguageModelling
from dist_lm.tasks.base import encoder_arguments


class FillMaskPredictor(Predictor):
    foresees = True
    fields = {"text": "a text, with mask tokens to predict, without to be judged"}

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
        logits_BTV = self._logits(rows)
        predictions: list[Prediction] = []
        for row, ids in enumerate(rows):
            places = [place for place, token in enumerate(ids) if token == self.tokenizer.mask_id]
            shares_MV = torch.softmax(logits_BTV[row, places].float(), dim=-1)
            best = torch.topk(shares_MV, min(self.options.top_k, shares_MV.shape[1]), dim=-1)
            predictions.append({"masks": [self._guesses(*one) for one in zip(best.indices, best.values, strict=True)]})
        return predictions

    def _logits(self, rows: list[list[int]]) -> torch.Tensor:
        inputs = self.batch(rows, token_type_ids=[[0] * len(row) for row in rows])
        output = self.model(**encoder_arguments(self.model, inputs))
        # BERT's pretraining model has two heads, and names this one so.
        logits_BTV: torch.Tensor = output["prediction_logits"] if "prediction_logits" in output else output["logits"]
        return logits_BTV

    def _guesses(self, tokens: torch.Tensor, shares: torch.Tensor) -> list[dict[str, Any]]:
        return [
            {"token": self.tokenizer.decode([token]).strip(), "probability": share}
            for token, share in zip(tokens.tolist(), shares.tolist(), strict=True)
        ]

    def expected(self, fields: Fields) -> list[list[int]]:
        """The text as model inputs of up to `seq_len` tokens, nothing masked."""
        ids = self.tokenizer.encode_batch([checked.text(fields, "text")])[0]
        if not ids:
            raise Unusable("field 'text' has no tokens: nothing to foresee")
        frame = self.tokenizer.frame()
        room = self.seq_len - frame.size
        return [[*frame.prefix, *ids[at : at + room], *frame.suffix] for at in range(0, len(ids), room)]

    def judge(self, expected: Sequence[list[list[int]]]) -> list[Prediction]:
        """Sums over the tokens of each record, each masked alone (Salazar et al. 2020)."""
        frame = self.tokenizer.frame()
        masked = [
            (number, window, place)
            for number, record in enumerate(expected)
            for window in record
            for place in range(len(frame.prefix), len(window) - len(frame.suffix))
        ]
        found = self.in_batches(masked, lambda item: len(item[1]), self._foresee)
        totals: list[Prediction] = [{"loss": 0.0, "right": 0, "tokens": 0} for _ in expected]
        for (number, _, _), (loss, right) in zip(masked, found, strict=True):
            totals[number]["loss"] += loss
            totals[number]["right"] += right
            totals[number]["tokens"] += 1
        return totals

    def _foresee(self, items: list[tuple[int, list[int], int]]) -> list[tuple[float, int]]:
        """Loss of each masked token, and whether the likeliest one is right."""
        rows = [[*ids[:place], self.tokenizer.mask_id, *ids[place + 1 :]] for _, ids, place in items]
        logits_BTV = self._logits(rows)
        places = torch.tensor([place for _, _, place in items], device=self.device)
        labels_B = torch.tensor([ids[place] for _, ids, place in items], device=self.device)
        logits_BV = logits_BTV[torch.arange(len(items), device=self.device), places].float()
        losses = F.cross_entropy(logits_BV, labels_B, reduction="none").tolist()
        return list(zip(losses, (logits_BV.argmax(dim=-1) == labels_B).tolist(), strict=True))

    def metric_set(self) -> MetricSet:
        return LanguageModelling("pseudo_perplexity", "each token masked alone (Salazar et al. 2020)")

    def counts(self, metrics: MetricSet, prediction: Prediction, expected: Any) -> Counts:
        return metrics.counts((prediction["loss"], prediction["right"]), prediction["tokens"])
