"""Extractive question answering: where in a window does the answer begin and end?

Enters: rows of kind `question_answering`.  Leaves: sums over windows of the mean of the two
cross-entropies.  Promises: the loss is transformers' own of each row without padding; a window counts
as right where both ends are.  Exact match and F1 over questions need the texts: `dist-lm eval`.

Shapes: B rows, T tokens per row, N real rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForQuestionAnswering, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import ModelSection
from dist_lm.data.rows import Rows
from dist_lm.tasks.base import MicroBatch, Task, attention_inputs, clipped, encoder_arguments


class QuestionAnswering(Task):
    data_kind = "question_answering"
    objectives = ("span",)

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        return self.described(
            models.build(
                section,
                self.tokenizer,
                AutoModelForQuestionAnswering,
                family="bert",
                positions=self.view.seq_len,
                seed=self.seed,
            )
        )

    def collate(self, rows: Rows) -> MicroBatch:
        ids_BT, lengths_B = clipped(rows, "tokens", "length")
        place_T = np.arange(ids_BT.shape[1])
        second_BT = (place_T >= rows.columns["second_begin"][:, None]) & (place_T < lengths_B[:, None])
        inputs = attention_inputs(ids_BT, second_BT.astype(np.int64), lengths_B)
        judged = np.flatnonzero(rows.real)
        inputs["judged_rows"] = torch.from_numpy(judged)
        for name in ("start", "end"):
            inputs[name] = torch.from_numpy(rows.columns[name][judged].astype(np.int64))
        return MicroBatch(inputs, {"span": len(judged)}, int(lengths_B[rows.real].sum()), ids_BT.size)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        output = model(**encoder_arguments(model, inputs))
        start_NT = _without_padding(output.start_logits, inputs)[inputs["judged_rows"]]
        end_NT = _without_padding(output.end_logits, inputs)[inputs["judged_rows"]]
        loss = F.cross_entropy(start_NT, inputs["start"], reduction="sum")
        loss = (loss + F.cross_entropy(end_NT, inputs["end"], reduction="sum")) / 2
        right = (start_NT.argmax(dim=-1) == inputs["start"]) & (end_NT.argmax(dim=-1) == inputs["end"])
        return {"span_loss": loss, "span_correct": right.sum()}


def _without_padding(logits_BT: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (fp32) that give padding no share: the loss of a row must not depend on its neighbours."""
    mask_BT = inputs.get("attention_mask")
    return logits_BT.float() if mask_BT is None else logits_BT.float().masked_fill(mask_BT == 0, float("-inf"))
