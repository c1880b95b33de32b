"""Instruction tuning: a causal model learns the answers of dialogues.

Enters: rows of kind `instruction`, several dialogues each.  Leaves: sums of the cross-entropy over
the tokens of answers.
Promises: the dialogues of a row do not see each other: positions begin anew with each, and
transformers' packed mask follows from them; so packed rows give the loss of the dialogues alone.

Shapes: B rows, T tokens per row, N targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import InstructionTask, ModelSection
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.tasks.base import MicroBatch, Task, clipped
from dist_lm.tasks.heads import Head, decoder_loss_sums, find_decoder_head


class InstructionTuning(Task):
    data_kind = "instruction"
    objectives = ("answer",)

    def __init__(self, settings: InstructionTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.settings = settings
        self._head: Head | None = None

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        model = models.build(
            section, self.tokenizer, AutoModelForCausalLM, family="gpt2", positions=self.view.seq_len, seed=self.seed
        )
        self.prepare_for(model)
        return self.described(model)

    def prepare_for(self, model: PreTrainedModel) -> None:
        self._head = find_decoder_head(model)

    def collate(self, rows: Rows) -> MicroBatch:
        ids_BT, lengths_B = clipped(rows, "tokens", "length")
        place_T = np.arange(ids_BT.shape[1])
        filled_BT = place_T < lengths_B[:, None]
        segment_BT = np.where(filled_BT, rows.columns["segment"][:, : ids_BT.shape[1]], 0)
        begins_BT = np.diff(segment_BT, axis=1, prepend=-1) != 0
        position_BT = place_T - np.maximum.accumulate(np.where(begins_BT, place_T, 0), axis=1)
        answer_BT = (rows.columns["answer"][:, : ids_BT.shape[1]] > 0) & filled_BT & rows.real[:, None]
        # The token before an answer's token predicts it, if it is of the same dialogue.
        judged_BT = np.zeros_like(filled_BT)
        judged_BT[:, :-1] = answer_BT[:, 1:] & ~begins_BT[:, 1:]
        judged = np.flatnonzero(judged_BT)
        inputs = {
            "input_ids": torch.from_numpy(ids_BT),
            "position_ids": torch.from_numpy(position_BT),
            "target_places": torch.from_numpy(judged),
            "target_labels": torch.from_numpy(ids_BT.reshape(-1)[judged + 1]),
        }
        return MicroBatch(inputs, {"answer": len(judged)}, int(lengths_B[rows.real].sum()), ids_BT.size)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return decoder_loss_sums("answer", model, self._head, inputs, chunk=self.settings.head_chunk)
