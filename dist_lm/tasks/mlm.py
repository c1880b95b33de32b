"""Masked language modelling, with next-sentence or sentence-order prediction where it is asked for.

Enters: rows of kind `pairs` (two segments of one document) or `tokens` (a window of documents).
Leaves: sums of the MLM loss and of that over pairs.
Promises: masks, replacements, false and turned pairs are pure functions of (seed, epoch, sample,
token position), so they are new in each epoch and equal for any number of ranks; the MLM head runs
at masked positions only, where the model's head is known; samples share rows where the model keeps them
apart, which changes nothing but the padding.

Sources: Devlin et al. 2019 (BERT), sections 3.1 and A.1; Liu et al. 2019 (RoBERTa: windows without
pairs); Lan et al. 2020 (ALBERT: sentence order).
Shapes: B rows, T tokens per row, M masked tokens of the micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoModelForPreTraining, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import MlmTask, ModelSection
from dist_lm.data.order import keyed_hash
from dist_lm.data.packing import best_fit
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.errors import ConfigError
from dist_lm.schedule import BatchPlan
from dist_lm.tasks.base import (
    MicroBatch,
    Task,
    attention_inputs,
    cross_entropy_sums,
    join_segments,
    joined_lengths,
)
from dist_lm.tasks.heads import ENCODER_HEADS, Head, find_head, takes
from dist_lm.tasks.masking import mask_rows
from dist_lm.tasks.packing import Layout, find_first_position, lay_out, packed_arguments, pooled

log = logging.getLogger(__name__)
# Domains keep the hashes of different decisions apart.
_SELECT, _PAIR = 101, 103
_PAIR_HEADS = ("cls.seq_relationship", "sop_classifier")
"""Modules that judge a pair by the pooled output: BERT's and ALBERT's."""
_WINDOW_SPECIALS = 2
"""[CLS] and [SEP] around a window of kind `tokens`."""
_SEGMENTS = 2


class _Segments(NamedTuple):
    """What stands in a row, and what is to be said about its pair."""

    parts: list[tuple[NDArray[Any], NDArray[np.int64]]]
    """(tokens [B, room], lengths [B]) of each segment."""
    judged_B: NDArray[np.bool_]
    label_B: NDArray[np.bool_]
    """True: the second segment is of another row (NSP), or the two are turned round (SOP).  Hugging
    Face numbers the classes so."""


class MaskedLanguageModelling(Task):
    data_kind = "pairs"
    other_kinds = ("tokens",)

    def __init__(self, settings: MlmTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.settings = settings
        self.windows = view.manifest.kind == "tokens"
        if self.windows and settings.pair != "none":
            raise ConfigError(
                f"rows of kind `tokens` have no pairs for task.pair {settings.pair}",
                where="task.pair",
                do="Set task.pair to none, or prepare the data with --kind pairs.",
            )
        if self.windows and settings.packing is True:
            raise ConfigError(
                "rows of kind `tokens` are full: task.packing has nothing to save",
                where="task.packing",
                do="Set task.packing to auto.",
            )
        self.pairs = settings.pair != "none"
        self.objectives = ("mlm", settings.pair) if self.pairs else ("mlm",)
        self.partner_columns = ("second", "second_length", "document") if settings.pair == "nsp" else ()
        self.positions = view.seq_len + (_WINDOW_SPECIALS if self.windows else 0)
        for role in ("cls_token", "sep_token", "mask_token"):
            tokenizer.special_id(role, needed_for="mlm")
        self._special = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._special[list(tokenizer.special_ids)] = True
        self._ordinary_ids = np.flatnonzero(~self._special)
        self._head: Head | None = None
        self._first_position: int | None = None
        """Where the positions of a sample begin in a row of several; None: each sample has a row of its own."""

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        auto_class = AutoModelForPreTraining if self.pairs else AutoModelForMaskedLM
        model = models.build(
            section, self.tokenizer, auto_class, family="bert", positions=self.positions, seed=self.seed
        )
        if self.pairs and _pair_head(model) is None:
            raise ConfigError(
                f"{type(model).__name__} has no head that judges pairs",
                where="task.pair",
                why="BERT and ALBERT have one.",
                do="Set task.pair to none, or use such a model.",
            )
        self.prepare_for(model)
        return model

    def prepare_for(self, model: PreTrainedModel) -> None:
        """Find the head that makes logits at some positions, and whether samples can share rows."""
        ids = torch.arange(8)[None] % self.tokenizer.vocab_size

        def logits() -> Tensor:
            output = model(input_ids=ids)
            found: Tensor = output["prediction_logits"] if "prediction_logits" in output else output["logits"]
            return found

        self._head = find_head(model, ENCODER_HEADS, lambda: model.base_model(input_ids=ids).last_hidden_state, logits)
        if self.windows or self.settings.packing is False:
            return
        self._first_position = find_first_position(model, pairs=self.pairs)
        if self._first_position is not None:
            log.info("samples share rows: a token attends to its own sample only")
        elif self.settings.packing is True:
            raise ConfigError(
                f"{type(model).__name__} cannot keep the samples of a row apart",
                where="task.packing",
                why="A token's hidden state changes with the sample before it, or the model takes no such mask.",
                do="Set task.packing to auto, or use a model such as BERT or RoBERTa.",
            )
        else:
            log.info("samples are padded: %s cannot keep those of a row apart", type(model).__name__)

    def divide(self, rows: Rows, plan: BatchPlan) -> list[Rows]:
        if self._first_position is None or plan.micro_steps == 1:
            return super().divide(rows, plan)
        lengths_B = joined_lengths(self._segments(rows).parts)
        shared = best_fit({row: int(lengths_B[row]) for row in np.flatnonzero(rows.real).tolist()}, self.positions)
        # Packed rows go round: a micro-step gets no more of them than it would get samples.
        parts = [sorted(chain.from_iterable(shared[step :: plan.micro_steps])) for step in range(plan.micro_steps)]
        return [rows.take(np.array(part)) if part else rows.take(slice(0, 1)).as_fillers() for part in parts]

    def collate(self, rows: Rows) -> MicroBatch:
        if self._first_position is not None:
            # Fillers weigh nothing; a row is needed all the same.
            rows = rows.take(np.flatnonzero(rows.real)) if rows.real.any() else rows.take(slice(0, 1))
        segments = self._segments(rows)
        ids_BT, kinds_BT, lengths_B = join_segments(segments.parts, self.tokenizer, end=self.positions)
        masked_BT, inputs_BT = mask_rows(
            ids_BT,
            ~self._special[ids_BT] & rows.real[:, None],
            keyed_hash(self.seed, _SELECT, rows.epoch, rows.sample_id),
            self.settings,
            mask_id=self.tokenizer.mask_id,
            ordinary_ids=self._ordinary_ids,
            continuation=self.tokenizer.continuation,
        )
        length = ids_BT.shape[1]
        layout = Layout(len(rows), length, np.arange(len(rows)) * length)
        if self._first_position is not None:
            layout = lay_out(lengths_B, limit=self.positions)
        if layout.num_rows < len(rows):
            inputs = layout.inputs(inputs_BT, kinds_BT, lengths_B, self.tokenizer.pad_id)
        else:
            inputs = attention_inputs(inputs_BT, kinds_BT, lengths_B)
        places_BT = layout.places_ST(length)
        inputs["masked_positions"] = torch.from_numpy(places_BT[masked_BT])
        inputs["masked_labels"] = torch.from_numpy(ids_BT[masked_BT])
        targets = {"mlm": int(masked_BT.sum())}
        if self.pairs:
            judged = np.flatnonzero(segments.judged_B)
            if self._first_position is None:
                inputs["pair_rows"] = torch.from_numpy(judged)
            else:
                # Also where no samples share rows: at ZeRO-3 all ranks must call the same modules.
                inputs["pair_places"] = torch.from_numpy(places_BT[judged, 0])
            inputs["pair_labels"] = torch.from_numpy(segments.label_B[judged].astype(np.int64))
            targets[self.settings.pair] = len(judged)
        return MicroBatch(inputs, targets, int(lengths_B[rows.real].sum()), layout.num_rows * layout.width)

    def _segments(self, rows: Rows) -> _Segments:
        """Half of the pairs, drawn anew each epoch, are false (NSP) or turned round (SOP)."""
        nobody = np.zeros(len(rows), dtype=bool)
        if self.windows:
            tokens = rows.columns["tokens"]
            whole_B = np.full(len(rows), tokens.shape[1], dtype=np.int64)
            return _Segments([(tokens, whole_B)], nobody, nobody)
        first = (rows.columns["first"], rows.columns["first_length"].astype(np.int64))
        second = (rows.columns["second"], rows.columns["second_length"].astype(np.int64))
        coin_B = keyed_hash(self.seed, _PAIR, rows.epoch, rows.sample_id) >> np.uint64(63) == 1
        paired_B = rows.real & (second[1] > 0)
        if self.settings.pair == "nsp":
            second, false_B = _false_seconds(rows, second, coin_B)
            return _Segments([first, second], rows.real & (second[1] > 0), false_B)
        if self.settings.pair == "sop":
            turned_B = coin_B & (second[1] > 0)
            return _Segments(_turned(first, second, turned_B), paired_B, turned_B)
        return _Segments([first, second], nobody, nobody)

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        seen = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        if getattr(model.config, "type_vocab_size", 0) >= _SEGMENTS and takes(model.base_model, "token_type_ids"):
            seen["token_type_ids"] = inputs["token_type_ids"]
        if "sample_numbers" in inputs:
            assert self._first_position is not None
            seen |= packed_arguments(model, inputs, self._first_position)
        head, places_M = self._head, inputs["masked_positions"]
        if head is None:
            output = model(**seen)
            logits = output["prediction_logits"] if "prediction_logits" in output else output["logits"]
            return cross_entropy_sums("mlm", logits.flatten(0, 1)[places_M], inputs["masked_labels"])
        encoded = model.base_model(**seen)
        hidden_NH = encoded.last_hidden_state.flatten(0, 1)
        logits_MV = head(model, hidden_NH[places_M])
        sums = cross_entropy_sums("mlm", logits_MV, inputs["masked_labels"])
        pair_head = _pair_head(model) if self.pairs else None
        if pair_head is not None:
            if "pair_places" in inputs:
                pooled_BH = pooled(model, hidden_NH[inputs["pair_places"]])
            else:
                pooled_BH = encoded.pooler_output[inputs["pair_rows"]]
            sums |= cross_entropy_sums(self.settings.pair, pair_head(pooled_BH), inputs["pair_labels"])
        return sums


def _pair_head(model: Any) -> Any:
    modules = dict(model.named_modules())
    return next((modules[name] for name in _PAIR_HEADS if name in modules), None)


def _false_seconds(
    rows: Rows, own: tuple[NDArray[Any], NDArray[np.int64]], coin_B: NDArray[np.bool_]
) -> tuple[tuple[NDArray[Any], NDArray[np.int64]], NDArray[np.bool_]]:
    """Second segments, and which of them are of another row.

    A row whose partner comes from the same document, or has no second segment, keeps its own.
    """
    partner_length = rows.columns["partner_second_length"].astype(np.int64)
    swapped_B = (
        coin_B & (own[1] > 0) & (partner_length > 0) & (rows.columns["partner_document"] != rows.columns["document"])
    )
    second = np.where(swapped_B[:, None], rows.columns["partner_second"], own[0])
    return (second, np.where(swapped_B, partner_length, own[1])), swapped_B


def _turned(
    first: tuple[NDArray[Any], NDArray[np.int64]],
    second: tuple[NDArray[Any], NDArray[np.int64]],
    turned_B: NDArray[np.bool_],
) -> list[tuple[NDArray[Any], NDArray[np.int64]]]:
    """The two segments, in the other order where `turned_B` says so."""
    width = max(first[0].shape[1], second[0].shape[1])
    one, two = (np.pad(tokens, ((0, 0), (0, width - tokens.shape[1]))) for tokens, _ in (first, second))
    turned_BT = turned_B[:, None]
    return [
        (np.where(turned_BT, two, one), np.where(turned_B, second[1], first[1])),
        (np.where(turned_BT, one, two), np.where(turned_B, first[1], second[1])),
    ]
