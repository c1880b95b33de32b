"""Masked language modelling, with next-sentence prediction where it is asked for.

Enters: rows of kind `pairs` (two segments of one document).  Leaves: sums of the MLM and NSP
losses.  Promises: masks, replacements and false pairs are pure functions of (seed, epoch, sample,
token position), so they are new in each epoch and equal for any number of ranks; the MLM head runs
at masked positions only.

Source: Devlin et al. 2019 (BERT), sections 3.1 and A.1.
Shapes: B rows, T tokens per row, M masked tokens of the micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import MlmTask, ModelSection
from dist_lm.data.order import keyed_hash
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.errors import ConfigError
from dist_lm.tasks.base import MicroBatch, Task, attention_inputs, cross_entropy_sums, join_segments

# Domains keep the hashes of different decisions apart.
_SELECT, _REPLACE, _PAIR = 101, 102, 103
_IS_NEXT, _IS_RANDOM = 0, 1
"""Hugging Face's meaning of the two NSP classes."""


class MaskedLanguageModelling(Task):
    data_kind = "pairs"

    def __init__(self, settings: MlmTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.settings = settings
        self.objectives = ("mlm", "nsp") if settings.next_sentence else ("mlm",)
        self.partner_columns = ("second", "second_length", "document") if settings.next_sentence else ()
        self._special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._special[list(tokenizer.special_ids)] = True
        self._ordinary_ids = np.flatnonzero(~self._special)

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        auto_class = AutoModelForPreTraining if self.settings.next_sentence else AutoModelForMaskedLM
        model = models.build(section, self.tokenizer, auto_class, positions=self.view.seq_len, seed=self.seed)
        if not hasattr(getattr(model, "cls", None), "predictions"):
            raise ConfigError(
                f"{type(model).__name__} has no head that the mlm task knows",
                where="model.from",
                why="The task computes BERT's head (`cls.predictions`) at masked positions only.",
                do="Use a BERT model.",
            )
        return model

    def collate(self, rows: Rows) -> MicroBatch:
        second, second_length, random_pair_B = self._second_segments(rows)
        first = (rows.columns["first"], rows.columns["first_length"].astype(np.int64))
        ids_BT, kinds_BT, lengths_B = join_segments(
            [first, (second, second_length)], self.tokenizer, end=self.view.seq_len
        )
        masked_BT, inputs_BT = self._mask(ids_BT, rows)
        masked_M = np.flatnonzero(masked_BT)
        inputs = attention_inputs(inputs_BT, kinds_BT, lengths_B)
        inputs["masked_positions"] = torch.from_numpy(masked_M)
        inputs["masked_labels"] = torch.from_numpy(ids_BT.reshape(-1)[masked_M])
        targets = {"mlm": len(masked_M)}
        if self.settings.next_sentence:
            judged_B = rows.real & (second_length > 0)
            judged = np.flatnonzero(judged_B)
            inputs["pair_rows"] = torch.from_numpy(judged)
            inputs["pair_labels"] = torch.from_numpy(
                np.where(random_pair_B[judged], _IS_RANDOM, _IS_NEXT).astype(np.int64)
            )
            targets["nsp"] = len(judged)
        return MicroBatch(inputs, targets, int(lengths_B[rows.real].sum()), ids_BT.size)

    def _second_segments(self, rows: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Second segments, their lengths, and which of them are not the true continuation.

        Half of the rows, drawn anew each epoch, take the segment of another row.  A row whose
        partner comes from the same document, or has no second segment, keeps its own.
        """
        own, own_length = rows.columns["second"], rows.columns["second_length"].astype(np.int64)
        if not self.settings.next_sentence:
            return own, own_length, np.zeros(len(rows), dtype=bool)
        coin_B = keyed_hash(self.seed, _PAIR, rows.epoch, rows.sample_id) >> np.uint64(63)
        partner_length = rows.columns["partner_second_length"].astype(np.int64)
        swapped_B = (
            (coin_B == 1)
            & (own_length > 0)
            & (partner_length > 0)
            & (rows.columns["partner_document"] != rows.columns["document"])
        )
        second = np.where(swapped_B[:, None], rows.columns["partner_second"], own)
        return second, np.where(swapped_B, partner_length, own_length), swapped_B

    def _mask(self, ids_BT: np.ndarray, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens are targets, and the ids that the model sees."""
        settings = self.settings
        place_T = np.arange(ids_BT.shape[1], dtype=np.uint64)
        row_key_B = keyed_hash(self.seed, _SELECT, rows.epoch, rows.sample_id)
        draw_BT = keyed_hash(row_key_B[:, None], place_T[None, :])
        maskable_BT = ~self._special[ids_BT] & rows.real[:, None]
        # One draw decides a unit: its high bits whether it is a target, its low bits how it is shown.
        unit_BT = draw_BT
        if settings.mask_unit == "word":
            start_BT = ~self.tokenizer.continuation[ids_BT] | ~maskable_BT
            last_start_BT = np.maximum.accumulate(np.where(start_BT, place_T[None, :], 0), axis=1)
            unit_BT = np.take_along_axis(draw_BT, last_start_BT.astype(np.int64), axis=1)
        masked_BT = maskable_BT & (_unit_interval(unit_BT >> np.uint64(32)) < settings.mask_probability)
        shown = _unit_interval(unit_BT & np.uint64(0xFFFFFFFF))
        # Replacement ids are drawn token by token, also inside a word.
        replacement_BT = self._ordinary_ids[
            (keyed_hash(draw_BT, _REPLACE) % np.uint64(len(self._ordinary_ids))).astype(np.int64)
        ]
        inputs_BT = np.where(masked_BT & (shown < settings.mask_share), self.tokenizer.mask_id, ids_BT)
        random_BT = masked_BT & (shown >= settings.mask_share)
        random_BT &= shown < settings.mask_share + settings.random_share
        return masked_BT, np.where(random_BT, replacement_BT, inputs_BT)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        encoded = model.base_model(
            input_ids=inputs["input_ids"],
            token_type_ids=inputs["token_type_ids"],
            attention_mask=inputs.get("attention_mask"),
        )
        hidden_MH = encoded.last_hidden_state.flatten(0, 1)[inputs["masked_positions"]]
        logits_MV = model.cls.predictions(hidden_MH)
        sums = cross_entropy_sums("mlm", logits_MV, inputs["masked_labels"])
        if self.settings.next_sentence:
            logits_B2 = model.cls.seq_relationship(encoded.pooler_output[inputs["pair_rows"]])
            sums |= cross_entropy_sums("nsp", logits_B2, inputs["pair_labels"])
        return sums


def _unit_interval(bits32: np.ndarray) -> np.ndarray:
    """Integers below 2**32 as numbers in [0, 1)."""
    return bits32.astype(np.float64) / 2.0**32
