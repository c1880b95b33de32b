"""Causal language modelling: each token from those before it in its document.

Enters: rows of kind `tokens` (a stretch of documents, each with a separator behind it).  Leaves: sums
of the loss over targets.
Promises: with isolated documents no logit depends on another document, and positions begin anew in
each; a separator is a target of the document that it ends, and what follows it is no target, since
nothing in its own document stands before it.

Shapes: B rows, T tokens per row, N targets of the micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import CausalLmTask, ModelSection
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.errors import ConfigError
from dist_lm.tasks.base import MicroBatch, Task
from dist_lm.tasks.heads import Head, decoder_loss_sums, find_decoder_head, takes, trial

log = logging.getLogger(__name__)
_TRIAL_TOKENS = 8
_SAME_LOGITS = 1e-4
"""Relative; another document moves logits by far more."""


class CausalLanguageModelling(Task):
    data_kind = "tokens"
    objectives = ("lm",)

    def __init__(self, settings: CausalLmTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.settings = settings
        self.separator_id = int(view.manifest.facts["separator_id"])
        self.isolated = settings.documents != "joined"
        self._head: Head | None = None

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        model = models.build(
            section, self.tokenizer, AutoModelForCausalLM, family="gpt2", positions=self.view.seq_len, seed=self.seed
        )
        self.prepare_for(model)
        return model

    def prepare_for(self, model: PreTrainedModel) -> None:
        """Find out what the model allows: documents apart from each other, a head at some positions."""
        self._head = find_decoder_head(model)
        if self.settings.documents == "joined":
            return
        self.isolated = _keeps_documents_apart(model)
        if not self.isolated and self.settings.documents == "isolated":
            raise ConfigError(
                f"{type(model).__name__} cannot keep the documents of a row apart",
                where="task.documents",
                why="A token's logits change with the document before it, though positions begin anew.",
                do="Set task.documents to joined, or use a GPT-2 or Llama model.",
            )
        if self.isolated:
            log.info("documents of a row are isolated: a token attends to its own document only")
        else:
            log.warning("documents of a row are joined: %s cannot keep them apart", type(model).__name__)

    def collate(self, rows: Rows) -> MicroBatch:
        ids_BT = rows.columns["tokens"].astype(np.int64)
        length = ids_BT.shape[1]
        inputs = {"input_ids": torch.from_numpy(ids_BT)}
        begins_BT = np.zeros(ids_BT.shape, dtype=bool)
        begins_BT[:, 0] = True
        if self.isolated:
            begins_BT[:, 1:] = ids_BT[:, :-1] == self.separator_id
            place_T = np.arange(length)[None, :]
            positions_BT = place_T - np.maximum.accumulate(np.where(begins_BT, place_T, 0), axis=1)
            inputs["position_ids"] = torch.from_numpy(positions_BT)
        predicts_BT = np.zeros(ids_BT.shape, dtype=bool)
        predicts_BT[:, :-1] = ~begins_BT[:, 1:] & rows.real[:, None]
        places_N = np.flatnonzero(predicts_BT)
        inputs["target_places"] = torch.from_numpy(places_N)
        # Labels are shifted here, and nowhere else.
        inputs["target_labels"] = torch.from_numpy(ids_BT.reshape(-1)[places_N + 1])
        return MicroBatch(inputs, {"lm": len(places_N)}, int(rows.real.sum()) * length, ids_BT.size)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return decoder_loss_sums(
            "lm",
            model,
            self._head,
            inputs,
            chunk=self.settings.head_chunk,
            smoothing=self.settings.label_smoothing if model.training else 0.0,
        )


def _keeps_documents_apart(model: Any) -> bool:
    """Whether positions that begin anew separate what stands before from what stands behind.

    transformers makes a block-diagonal mask of such positions, for most models; here it is tried.
    """
    if not takes(model, "position_ids"):
        return False
    half = _TRIAL_TOKENS // 2
    ids_BT = torch.arange(2 * _TRIAL_TOKENS).reshape(2, -1) % model.config.vocab_size
    # Two rows with the same second document and different first ones.
    ids_BT[1, half:] = ids_BT[0, half:]
    positions = torch.cat([torch.arange(half), torch.arange(_TRIAL_TOKENS - half)]).expand(2, -1)
    with trial(model):
        logits = model(input_ids=ids_BT, position_ids=positions, use_cache=False).logits
    difference = (logits[0, half:] - logits[1, half:]).abs().max()
    return bool(difference <= _SAME_LOGITS * logits.abs().max())
