"""Token classification: a tag for every word.

Enters: rows of kind `token_classification`.  Leaves: sums of the cross-entropy over the tokens that
carry a tag: the first of each word, or all.
Promises: the first token of a word decides its tag, in training's metrics as in prediction.

Shapes: B rows, T tokens per row, N targets, C tags.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import ModelSection, TokenClassificationTask
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.errors import DataError
from dist_lm.scores.base import MetricState
from dist_lm.scores.entities import Entities
from dist_lm.tasks.base import (
    PREDICTED,
    MicroBatch,
    Task,
    attention_inputs,
    clipped,
    cross_entropy_sums,
    encoder_arguments,
    head_fields,
)
from dist_lm.tasks.classification import class_weights


class TokenClassification(Task):
    data_kind = "token_classification"
    objectives = ("tag",)

    def __init__(self, settings: TokenClassificationTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.settings = settings
        self.labels = tuple(view.manifest.labels)
        if len(self.labels) < 2:
            raise DataError(
                f"a tagger needs at least two tags, the data set has {len(self.labels)}",
                where="data.train",
                do="Check the field `tags` of the records (`--field tags=NAME` takes another).",
            )
        self.weights_C = class_weights(settings.class_weights, view.manifest)
        self._suffix = len(tokenizer.frame().suffix)

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        return self.described(
            models.build(
                section,
                self.tokenizer,
                AutoModelForTokenClassification,
                family="bert",
                positions=self.view.seq_len,
                seed=self.seed,
                **head_fields(self.labels),
            )
        )

    def collate(self, rows: Rows) -> MicroBatch:
        ids_BT, lengths_B = clipped(rows, "tokens", "length")
        start_BT = rows.columns["word_start"][:, : ids_BT.shape[1]] > 0
        start_BT &= np.arange(ids_BT.shape[1]) < lengths_B[:, None]
        word_BT = np.cumsum(start_BT, axis=1) - 1
        judged_BT = start_BT
        if self.settings.label_tokens == "all":
            inside_BT = np.arange(ids_BT.shape[1]) < (lengths_B - self._suffix)[:, None]
            judged_BT = (word_BT >= 0) & inside_BT
        row, place = np.nonzero(judged_BT & rows.real[:, None])
        inputs = attention_inputs(ids_BT, np.zeros_like(ids_BT), lengths_B)
        inputs["judged"] = torch.from_numpy(row * ids_BT.shape[1] + place)
        inputs["labels"] = torch.from_numpy(rows.columns["tag"][row, word_BT[row, place]].astype(np.int64))
        # Row of a target that decides a word's tag, -1 for the others.
        inputs["word_row"] = torch.from_numpy(np.where(start_BT[row, place], row, -1))
        return MicroBatch(inputs, {"tag": len(row)}, int(lengths_B[rows.real].sum()), ids_BT.size)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits_BTC = model(**encoder_arguments(model, inputs)).logits
        logits_NC = logits_BTC.flatten(0, 1)[inputs["judged"]].float()
        weights_C = None if self.weights_C is None else self.weights_C.to(logits_NC.device)
        smoothing = self.settings.label_smoothing
        sums = cross_entropy_sums("tag", logits_NC, inputs["labels"], weights_C=weights_C, label_smoothing=smoothing)
        return sums if model.training else {**sums, PREDICTED: logits_NC.detach().argmax(dim=-1)}

    def metrics_state(self) -> MetricState:
        return MetricState(Entities(self.labels))

    def judge(self, state: MetricState, predicted: Tensor, micro_batch: MicroBatch) -> None:
        row_N = micro_batch.inputs["word_row"].numpy()
        guess_N, truth_N = predicted.numpy(), micro_batch.inputs["labels"].numpy()
        for row in np.unique(row_N[row_N >= 0]):
            words = row_N == row
            state.add(
                [self.labels[number] for number in guess_N[words]],
                [self.labels[number] for number in truth_N[words]],
            )
