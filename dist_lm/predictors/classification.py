"""Labels with their probabilities, or a value, for texts and pairs of texts.

Enters: `text`, and `text_pair` where the model was trained on pairs.  Leaves: `label`, `labels` or
`value`.  Promises: a text that is too long is cut as it was for training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Unusable
from dist_lm.data.kinds.classification import cut_longer_first
from dist_lm.predictors.attributions import Part
from dist_lm.predictors.base import Prediction, Predictor
from dist_lm.scores.base import Counts, MetricSet
from dist_lm.tasks.base import encoder_arguments
from dist_lm.tasks.classification import MANY, NUMBER, ONE, metric_set

_LABELS_SHOWN = 8


class ClassificationPredictor(Predictor):
    fields = {"text": "a text", "text_pair": "a second one, for a model of pairs"}

    @property
    def problem(self) -> str:
        config = self.model.config
        return str(config.problem_type or (NUMBER if config.num_labels == 1 else ONE))

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(self.model.config.id2label[number] for number in range(self.model.config.num_labels))

    def clean(self, fields: Fields) -> tuple[str, str | None]:
        text = checked.text(fields, "text")
        if self.trained.made.get("text_pair") or fields.get("text_pair") is not None:
            return text, checked.text(fields, "text_pair")
        return text, None

    def predict(self, cleaned: Sequence[tuple[str, str | None]]) -> list[Prediction]:
        return self.in_batches([self._row(*texts) for texts in cleaned], lambda row: len(row[0]), self._forward)

    def _row(self, text: str, pair: str | None) -> tuple[list[int], list[int]]:
        """Token numbers and segment ids."""
        frame = self.tokenizer.frame(pair=pair is not None)
        first, second = self._cut(text, pair)
        head = [*frame.prefix, *first, *frame.middle]
        tail = [*second, *frame.suffix]
        return head + tail, [0] * len(head) + [int(pair is not None)] * len(tail)

    def _cut(self, text: str, pair: str | None) -> tuple[list[int], list[int]]:
        """Token numbers of the texts, as many as there is room for."""
        room = self.seq_len - self.tokenizer.frame(pair=pair is not None).size
        first, second = self.tokenizer.encode_batch([text, pair or ""])
        return cut_longer_first(first, second, room) if pair is not None else (first[:room], [])

    def explain(self, cleaned: tuple[str, str | None], prediction: Prediction) -> list[dict[str, Any]]:
        """One explanation of the label, of each label that holds, or of the value."""
        text, pair = cleaned
        ids, kinds = self._row(text, pair)
        parts, place = [], len(self.tokenizer.frame(pair=pair is not None).prefix)
        encodings = self.tokenizer.encodings([text, pair or ""])
        lengths = [len(part) for part in self._cut(text, pair)]
        for name, source, encoding, length in zip(
            ("text", "text_pair"), (text, pair or ""), encodings, lengths, strict=True
        ):
            for begin, end in encoding.offsets[:length]:
                parts.append(Part(name, begin, end, source[begin:end], [place]))
                place += 1
            place += len(self.tokenizer.frame(pair=True).middle)
        inputs = encoder_arguments(self.model, self.batch([ids], token_type_ids=[kinds]))
        told = {part.tokens[0] for part in parts}
        is_text = [place in told for place in range(len(ids))]
        chosen = ["value"] if self.problem == NUMBER else prediction.get("labels", [prediction.get("label")])
        explanations = []
        for target in chosen:
            number = 0 if self.problem == NUMBER else self.labels.index(target)
            found = self.attributor.of(inputs, is_text, partial(_logit, number))
            explanations.append(found.told(target, parts))
        return explanations

    def _forward(self, rows: list[tuple[list[int], list[int]]]) -> list[Prediction]:
        inputs = self.batch([ids for ids, _ in rows], token_type_ids=[kinds for _, kinds in rows])
        logits_BC = self.model(**encoder_arguments(self.model, inputs)).logits.float().cpu()
        if self.problem == NUMBER:
            return [{"value": float(value)} for value in logits_BC[:, 0]]
        many = self.problem == MANY
        shares_BC = torch.sigmoid(logits_BC) if many else torch.softmax(logits_BC, dim=-1)
        return [self._named(shares.tolist(), many) for shares in shares_BC]

    def _named(self, shares: list[float], many: bool) -> Prediction:
        probabilities = dict(zip(self.labels, shares, strict=True))
        if many:
            return {
                "labels": [label for label, share in probabilities.items() if share > 0.5],
                "probabilities": probabilities,
            }
        label = max(probabilities, key=lambda name: probabilities[name])
        return {"label": label, "probability": probabilities[label], "probabilities": probabilities}

    def expected(self, fields: Fields) -> Any:
        if self.problem == NUMBER:
            return checked.number(fields, "label")
        if self.problem == MANY:
            return [self._number_of(label) for label in checked.labels(fields, "label")]
        return self._number_of(checked.label(fields, "label"))

    def _number_of(self, label: str) -> int:
        if label not in self.labels:
            known = ", ".join(self.labels[:_LABELS_SHOWN]) + (" ..." if len(self.labels) > _LABELS_SHOWN else "")
            raise Unusable(f"the model does not know the label `{label}`; it knows {known}")
        return self.labels.index(label)

    def metric_set(self) -> MetricSet:
        return metric_set(self.problem, self.labels)

    def counts(self, metrics: MetricSet, prediction: Prediction, expected: Any) -> Counts:
        if self.problem == NUMBER:
            return metrics.counts(prediction["value"], expected)
        if self.problem == MANY:
            return metrics.counts([self._number_of(label) for label in prediction["labels"]], expected)
        return metrics.counts(self._number_of(prediction["label"]), expected)


def _logit(number: int, logits_BC: torch.Tensor) -> torch.Tensor:
    return logits_BC[:, number]
