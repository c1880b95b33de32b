"""Text classification and regression: one class a text, many classes, or a number; of texts or pairs.

Enters: rows of kind `classification`.  Leaves: sums over rows of the cross-entropy, of the binary
cross-entropy over classes, or of the squared error.
Promises: a row of weight zero is no target; without class weights the loss is transformers' own.

Shapes: B rows, T tokens per row, N real rows, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import ClassificationTask, ModelSection
from dist_lm.data.manifest import LABEL_COUNTS, Manifest
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.errors import ConfigError, DataError
from dist_lm.scores.base import MetricSet, MetricState
from dist_lm.scores.classes import ManyClasses, Numbers, OneClass
from dist_lm.tasks.base import (
    LENGTH_MULTIPLE,
    PREDICTED,
    MicroBatch,
    Task,
    attention_inputs,
    cross_entropy_sums,
    encoder_arguments,
    head_fields,
)

ONE, MANY, NUMBER = "single_label_classification", "multi_label_classification", "regression"
"""transformers' names (`problem_type`)."""
_LIKELY = 0.0
"""A class of many is predicted where its logit is above: its probability is above one half."""


class Classification(Task):
    data_kind = "classification"
    objectives = ("label",)

    def __init__(self, settings: ClassificationTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.settings = settings
        self.problem = str(view.manifest.facts.get("problem_type", ONE))
        self.labels = tuple(view.manifest.labels)
        if self.problem not in (ONE, MANY, NUMBER):
            raise DataError(
                "the data set holds texts without labels",
                where="data.train",
                do="Prepare it with --option labels=one, many or number.",
            )
        if self.problem == ONE and len(self.labels) < 2:
            raise DataError(
                f"a classifier needs at least two labels, the data set has {len(self.labels)}",
                where="data.train",
                do="Check the field `label` of the records (`--field label=NAME` takes another).",
            )
        if self.problem != ONE and (settings.class_weights or settings.label_smoothing):
            raise ConfigError(
                "class weights and label smoothing have no effect on this data set",
                where="task.class_weights, task.label_smoothing",
                why=f"They belong to one label a text; this is {self.problem.replace('_', ' ')}.",
                do="Remove them.",
            )
        self.weights_C = class_weights(settings.class_weights, view.manifest)

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        head = {"num_labels": 1} if self.problem == NUMBER else head_fields(self.labels)
        return self.described(
            models.build(
                section,
                self.tokenizer,
                AutoModelForSequenceClassification,
                family="bert",
                positions=self.view.seq_len,
                seed=self.seed,
                problem_type=self.problem,
                **head,
            )
        )

    def collate(self, rows: Rows) -> MicroBatch:
        pair = "second" in rows.columns
        names = [("first", "first_length"), ("second", "second_length")] if pair else [("tokens", "length")]
        segments = [(rows.columns[tokens], rows.columns[length].astype(np.int64)) for tokens, length in names]
        ids_BT, kinds_BT, lengths_B = framed_rows(segments, self.tokenizer, end=self.view.seq_len)
        inputs = attention_inputs(ids_BT, kinds_BT, lengths_B)
        judged = np.flatnonzero(rows.real)
        inputs["judged_rows"] = torch.from_numpy(judged)
        inputs["labels"] = torch.from_numpy(self._labels(rows.take(judged)))
        # Each class of many is a target of its own.
        targets = len(judged) * (len(self.labels) if self.problem == MANY else 1)
        return MicroBatch(inputs, {"label": targets}, int(lengths_B[rows.real].sum()), ids_BT.size)

    def _labels(self, rows: Rows) -> np.ndarray:
        """[N] class numbers (int64), [N, C] of 0 and 1 (fp32), or [N] values (fp32)."""
        if self.problem == ONE:
            return rows.columns["label"].astype(np.int64)
        if self.problem == NUMBER:
            return rows.columns["target"].astype(np.float32)
        held_NC = np.zeros((len(rows), len(self.labels)), dtype=np.float32)
        numbers = rows.columns["labels"]
        row, place = np.nonzero(np.arange(numbers.shape[1]) < rows.columns["num_labels"][:, None])
        held_NC[row, numbers[row, place]] = 1.0
        return held_NC

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits_NC = model(**encoder_arguments(model, inputs)).logits[inputs["judged_rows"]].float()
        labels = inputs["labels"]
        if self.problem == NUMBER:
            predicted = logits_NC[:, 0]
            sums = {"label_loss": F.mse_loss(predicted, labels, reduction="sum")}
        elif self.problem == MANY:
            predicted = logits_NC.detach() > _LIKELY
            loss = F.binary_cross_entropy_with_logits(logits_NC, labels, reduction="sum")
            sums = {"label_loss": loss, "label_correct": (predicted == (labels > 0)).sum()}
        else:
            predicted = logits_NC.argmax(dim=-1)
            weights_C = None if self.weights_C is None else self.weights_C.to(logits_NC.device)
            smoothing = self.settings.label_smoothing
            sums = cross_entropy_sums("label", logits_NC, labels, weights_C=weights_C, label_smoothing=smoothing)
        return sums if model.training else {**sums, PREDICTED: predicted.detach()}

    def metrics_state(self) -> MetricState:
        return MetricState(metric_set(self.problem, self.labels))

    def judge(self, state: MetricState, predicted: Tensor, micro_batch: MicroBatch) -> None:
        for guess, truth in zip(predicted, micro_batch.inputs["labels"], strict=True):
            if self.problem == MANY:
                state.add(guess.nonzero().flatten().tolist(), truth.nonzero().flatten().tolist())
            else:
                state.add(guess.item(), truth.item())


def framed_rows(
    segments: list[tuple[np.ndarray, np.ndarray]], tokenizer: Tokenizer, *, end: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One text or two between the special tokens that the tokenizer itself puts around them.

    `segments` holds (tokens [B, room], lengths [B]); `end` is the longest row allowed.  Returns input_ids
    [B, T], segment_ids [B, T] and lengths [B], T a multiple of LENGTH_MULTIPLE.
    """
    frame = tokenizer.frame(pair=len(segments) == 2)
    begin_B = np.full(len(segments[0][1]), len(frame.prefix), dtype=np.int64)
    lengths_B = np.full(len(segments[0][1]), frame.size, dtype=np.int64)
    for _, lengths in segments:
        lengths_B += lengths
    width = min(-(-int(lengths_B.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, end)
    ids_BT = np.full((len(begin_B), width), tokenizer.pad_id, dtype=np.int64)
    kinds_BT = np.zeros((len(begin_B), width), dtype=np.int64)
    ids_BT[:, : len(frame.prefix)] = frame.prefix
    for number, (tokens, lengths) in enumerate(segments):
        row, column = np.nonzero(np.arange(tokens.shape[1])[None, :] < lengths[:, None])
        ids_BT[row, begin_B[row] + column] = tokens[row, column]
        begin_B = begin_B + lengths
        closing = frame.suffix if number == len(segments) - 1 else frame.middle
        for token in closing:
            ids_BT[np.arange(len(begin_B)), begin_B] = token
            begin_B = begin_B + 1
        if number + 1 < len(segments):
            place_T = np.arange(width)[None, :]
            kinds_BT[(place_T >= begin_B[:, None]) & (place_T < lengths_B[:, None])] = 1
    return ids_BT, kinds_BT, lengths_B


def metric_set(problem: str, labels: tuple[str, ...]) -> MetricSet:
    """Metrics of class numbers, sets of class numbers, or values."""
    if problem == NUMBER:
        return Numbers()
    return ManyClasses(labels) if problem == MANY else OneClass(labels)


def class_weights(weights: Mapping[str, float] | Literal["balanced"], manifest: Manifest) -> Tensor | None:
    """[C] weight of each class; None where all weigh 1.  ConfigError for a class that is none,
    DataError where labels were not counted."""
    labels = manifest.labels
    if weights == "balanced":
        counted = manifest.preparation.get(LABEL_COUNTS, {})
        if not set(labels) <= set(counted):
            raise DataError(
                "the manifest does not tell how often each label stands in the data set",
                where="task.class_weights: balanced",
                do="Prepare the data again, or write the weights.",
            )
        counts = [counted[label] for label in labels]
        # A label of the held-out rows alone is no target of training.
        return torch.tensor([sum(counts) / (len(labels) * count) if count else 1.0 for count in counts])
    unknown = sorted(set(weights) - set(labels))
    if unknown:
        raise ConfigError(
            f"`{unknown[0]}` is no label of the data set",
            where="task.class_weights",
            why=f"Its labels: {', '.join(labels[:20])}{' ...' if len(labels) > 20 else ''}.",
            do="Name labels of the data set, or write balanced.",
        )
    return torch.tensor([weights.get(label, 1.0) for label in labels]) if weights else None
