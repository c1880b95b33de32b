"""A task of one's own: which tokens of a text were replaced by random ones?  (As ELECTRA asks, without its generator.)

    task:
      name: custom
      class: replaced_tokens:ReplacedTokens
      options: {share: 0.2}

    PYTHONPATH=docs/examples dist-lm train -c my.yaml --cpu 2

The data are of kind `tokens`.  B rows, T tokens per row, R real rows.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForTokenClassification, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import CustomTask, ModelSection
from dist_lm.data.order import keyed_hash
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.tasks.base import MicroBatch, Task, cross_entropy_sums

_CHOOSE, _DRAW = 9001, 9002  # keep the two decisions apart


class ReplacedTokens(Task):
    data_kind = "tokens"
    objectives = ("replaced",)

    def __init__(self, settings: CustomTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.share = float(settings.options.get("share", 0.15))

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        auto_class, positions = AutoModelForTokenClassification, self.view.seq_len
        return models.build(
            section, self.tokenizer, auto_class, family="bert", positions=positions, seed=self.seed, num_labels=2
        )

    def collate(self, rows: Rows) -> MicroBatch:
        """Chosen by a hash of what the row is, so equal for any number of ranks and after a resume."""
        ids_BT = rows.columns["tokens"].astype(np.int64)
        place_T = np.arange(ids_BT.shape[1], dtype=np.uint64)
        row_B1 = keyed_hash(self.seed, rows.epoch, rows.sample_id)[:, None]
        chosen_BT = keyed_hash(_CHOOSE, row_B1, place_T) < np.uint64(self.share * 2**64)
        drawn_BT = (keyed_hash(_DRAW, row_B1, place_T) % np.uint64(self.tokenizer.vocab_size)).astype(np.int64)
        seen_BT = np.where(chosen_BT, drawn_BT, ids_BT)
        labels_RT = (seen_BT != ids_BT)[rows.real].astype(np.int64)
        inputs = {"input_ids": seen_BT, "labels": labels_RT, "real_rows": np.flatnonzero(rows.real)}
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return MicroBatch(tensors, {"replaced": labels_RT.size}, labels_RT.size, ids_BT.size)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        logits_RT2 = model(input_ids=inputs["input_ids"]).logits[inputs["real_rows"]]
        return cross_entropy_sums("replaced", logits_RT2.flatten(0, 1), inputs["labels"].flatten())
