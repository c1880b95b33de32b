"""Translation, summarisation and other text to text with an encoder and a decoder.

Enters: rows of kind `seq2seq`.  Leaves: sums of the cross-entropy over the targets' tokens.
Promises: the loss is transformers' own, label smoothing that of its Trainer; BLEU and the like need
generated text: `dist-lm eval`.

Shapes: B rows, S source tokens, T target tokens, N targets, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import ModelSection, Seq2SeqTask
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.tasks.base import MicroBatch, Task, clipped, cross_entropy_sums


class Seq2Seq(Task):
    data_kind = "seq2seq"
    objectives = ("target",)

    def __init__(self, settings: Seq2SeqTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.settings = settings

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        return self.described(
            models.build(
                section,
                self.tokenizer,
                AutoModelForSeq2SeqLM,
                family="t5",
                positions=max(self.view.seq_len, self.view.column("target").shape[0]),
                seed=self.seed,
            )
        )

    def collate(self, rows: Rows) -> MicroBatch:
        source_BS, source_lengths_B = clipped(rows, "source", "source_length")
        target_BT, target_lengths_B = clipped(rows, "target", "target_length")
        filled_BS = np.arange(source_BS.shape[1]) < source_lengths_B[:, None]
        judged_BT = (np.arange(target_BT.shape[1]) < target_lengths_B[:, None]) & rows.real[:, None]
        judged = np.flatnonzero(judged_BT)
        inputs = {
            "input_ids": torch.from_numpy(source_BS),
            "attention_mask": torch.from_numpy(filled_BS.astype(np.int64)),
            "target_ids": torch.from_numpy(target_BT),
            "judged": torch.from_numpy(judged),
        }
        tokens = int(source_lengths_B[rows.real].sum()) + len(judged)
        return MicroBatch(inputs, {"target": len(judged)}, tokens, source_BS.size + target_BT.size)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        target_BT = inputs["target_ids"]
        # The decoder sees the target one place later; padding at the end reaches no judged place.
        start_B1 = torch.full_like(target_BT[:, :1], model.config.decoder_start_token_id)
        logits_BTV = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            decoder_input_ids=torch.cat([start_B1, target_BT[:, :-1]], dim=1),
            use_cache=False,
        ).logits
        logits_NV = logits_BTV.flatten(0, 1)[inputs["judged"]]
        labels_N = target_BT.flatten()[inputs["judged"]]
        return cross_entropy_sums("target", logits_NV, labels_N, label_smoothing=self.settings.label_smoothing)
