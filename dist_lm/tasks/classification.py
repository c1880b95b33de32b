"""Text classification: one label a text.

Enters: rows of kind `classification`.  Leaves: sums of the cross-entropy over rows.
Promises: a row of weight zero is no target.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import ModelSection
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.errors import DataError
from dist_lm.tasks.base import (
    MicroBatch,
    Task,
    attention_inputs,
    cross_entropy_sums,
    head_fields,
    join_segments,
)


class Classification(Task):
    data_kind = "classification"
    objectives = ("label",)

    def __init__(self, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        if len(view.manifest.labels) < 2:
            raise DataError(
                f"a classifier needs at least two labels, the data set has {len(view.manifest.labels)}",
                where="data.train",
                do="Check --label-field of `dist-lm data prepare`.",
            )
        self.labels = tuple(view.manifest.labels)

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        return models.build(
            section,
            self.tokenizer,
            AutoModelForSequenceClassification,
            family="bert",
            positions=self.view.seq_len,
            seed=self.seed,
            **head_fields(self.labels),
        )

    def collate(self, rows: Rows) -> MicroBatch:
        text = (rows.columns["tokens"], rows.columns["length"].astype(np.int64))
        ids_BT, kinds_BT, lengths_B = join_segments([text], self.tokenizer, end=self.view.seq_len)
        inputs = attention_inputs(ids_BT, kinds_BT, lengths_B)
        judged = np.flatnonzero(rows.real)
        inputs["judged_rows"] = torch.from_numpy(judged)
        inputs["labels"] = torch.from_numpy(rows.columns["label"][judged].astype(np.int64))
        return MicroBatch(inputs, {"label": len(judged)}, int(lengths_B[rows.real].sum()), ids_BT.size)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        output = model(
            input_ids=inputs["input_ids"],
            token_type_ids=inputs["token_type_ids"],
            attention_mask=inputs.get("attention_mask"),
        )
        return cross_entropy_sums("label", output.logits[inputs["judged_rows"]], inputs["labels"])
