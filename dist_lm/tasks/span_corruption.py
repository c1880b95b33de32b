"""Span corruption (T5), or prefix language modelling with the same models.

Enters: rows of kind `tokens`.  Leaves: sums of the loss over the decoder's targets.
Promises: noise and split points are pure functions of (seed, epoch, sample); encoder input and target
together hold the row, token for token.

    span      encoder: the cat <extra_id_0> on <extra_id_1> </s>     decoder: <extra_id_0> sat <extra_id_1> the mat </s>
    prefix    encoder: the cat sat </s>                              decoder: on the mat </s>

Source: Raffel et al. 2020 (T5), sections 3.1.4 and 3.3.
Shapes: B rows, T tokens per row, E encoder and D decoder places, N targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from dist_lm import model as models
from dist_lm.config import ModelSection, SpanCorruptionTask
from dist_lm.data.order import keyed_hash
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.errors import ConfigError
from dist_lm.tasks.base import MicroBatch, Task
from dist_lm.tasks.heads import Head, decoder_heads, find_head, loss_sums_in_chunks
from dist_lm.tasks.spans import noise_counts, noise_mask, prefix_lengths, replace_spans

_ROW = 110
_IGNORED = -100
"""Label of a place that is no target; the models' own shift makes it the padding token."""


class SpanCorruption(Task):
    data_kind = "tokens"
    objectives = ("span",)

    def __init__(self, settings: SpanCorruptionTask, tokenizer: Tokenizer, view: View, seed: int) -> None:
        super().__init__(tokenizer, view, seed)
        self.settings = settings
        self._eos_id = tokenizer.special_id("eos_token", needed_for="span_corruption")
        self._head: Head | None = None
        if settings.objective == "span":
            _, self._num_spans = noise_counts(
                view.seq_len, density=settings.noise_density, mean_span=settings.mean_span
            )
            if not tokenizer.sentinels:
                tokenizer.special_id("<extra_id_0>", needed_for="span_corruption")
            if self._num_spans > len(tokenizer.sentinels):
                raise ConfigError(
                    f"a row has {self._num_spans} noise spans, the tokenizer {len(tokenizer.sentinels)} sentinels",
                    where="task.noise_density, task.mean_span",
                    why=f"Rows have {view.seq_len} tokens.",
                    do="Raise task.mean_span, or lower task.noise_density or data.seq_len.",
                )
        self._sentinels = np.array(tokenizer.sentinels, dtype=np.int64)

    def build_model(self, section: ModelSection) -> PreTrainedModel:
        # The longer side: nearly the whole row, and the end of text.
        positions = self.view.seq_len + 1
        model = models.build(
            section, self.tokenizer, AutoModelForSeq2SeqLM, family="t5", positions=positions, seed=self.seed
        )
        if not hasattr(model, "prepare_decoder_input_ids_from_labels"):
            raise ConfigError(
                f"{type(model).__name__} does not tell how it shifts targets",
                where="model",
                do="Use a T5 or BART model.",
            )
        self.prepare_for(model)
        return model

    def prepare_for(self, model: PreTrainedModel) -> None:
        """Find the head that makes logits of the decoder's hidden states."""
        ids = torch.arange(8)[None] % self.tokenizer.vocab_size
        self._head = find_head(
            model,
            decoder_heads(model),
            lambda: _decoded(model, {"input_ids": ids}, ids),
            lambda: model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits,
        )

    def collate(self, rows: Rows) -> MicroBatch:
        ids_BT = rows.columns["tokens"].astype(np.int64)
        keys_B = keyed_hash(self.seed, _ROW, rows.epoch, rows.sample_id)
        if self.settings.objective == "span":
            encoder_BE, labels_BD = self._corrupt(ids_BT, keys_B)
            inputs = {"input_ids": torch.from_numpy(encoder_BE)}
            sizes_B = np.full(len(rows), encoder_BE.shape[1] + labels_BD.shape[1])
        else:
            encoder_BE, labels_BD, ends_B = self._split(ids_BT, keys_B)
            seen_BE = np.arange(encoder_BE.shape[1])[None, :] < ends_B[:, None]
            inputs = {
                "input_ids": torch.from_numpy(encoder_BE),
                "attention_mask": torch.from_numpy(seen_BE.astype(np.int64)),
            }
            sizes_B = np.full(len(rows), ids_BT.shape[1] + 2)
        labels_BD[~rows.real] = _IGNORED
        places_N = np.flatnonzero(labels_BD != _IGNORED)
        inputs["labels"] = torch.from_numpy(labels_BD)
        inputs["target_places"] = torch.from_numpy(places_N)
        tokens = int(sizes_B[rows.real].sum())
        return MicroBatch(inputs, {"span": len(places_N)}, tokens, encoder_BE.size + labels_BD.size)

    def _corrupt(
        self, ids_BT: NDArray[np.int64], keys_B: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        noise_BT = noise_mask(
            keys_B, ids_BT.shape[1], density=self.settings.noise_density, mean_span=self.settings.mean_span
        )
        end = np.full((len(ids_BT), 1), self._eos_id, dtype=np.int64)
        encoder = replace_spans(ids_BT, noise_BT, self._sentinels)
        target = replace_spans(ids_BT, ~noise_BT, self._sentinels)
        return np.concatenate([encoder, end], axis=1), np.concatenate([target, end], axis=1)

    def _split(
        self, ids_BT: NDArray[np.int64], keys_B: NDArray[np.uint64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Encoder rows, labels, and the lengths of the encoder rows with their end."""
        length = ids_BT.shape[1]
        prefix_B = prefix_lengths(keys_B, length)
        rest_B = length - prefix_B
        encoder_BE = np.full((len(ids_BT), int(prefix_B.max()) + 1), self.tokenizer.pad_id, dtype=np.int64)
        labels_BD = np.full((len(ids_BT), int(rest_B.max()) + 1), _IGNORED, dtype=np.int64)
        place_E, place_D = np.arange(encoder_BE.shape[1])[None, :], np.arange(labels_BD.shape[1])[None, :]
        row_T = np.arange(length)[None, :]
        encoder_BE[place_E < prefix_B[:, None]] = ids_BT[row_T < prefix_B[:, None]]
        labels_BD[place_D < rest_B[:, None]] = ids_BT[row_T >= prefix_B[:, None]]
        encoder_BE[place_E == prefix_B[:, None]] = self._eos_id
        labels_BD[place_D == rest_B[:, None]] = self._eos_id
        return encoder_BE, labels_BD, prefix_B + 1

    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        labels_BD, places_N = inputs["labels"], inputs["target_places"]
        decoder_ids_BD = model.prepare_decoder_input_ids_from_labels(labels=labels_BD)
        seen = {name: inputs[name] for name in ("input_ids", "attention_mask") if name in inputs}
        head = self._head
        if head is None:
            found = model(**seen, decoder_input_ids=decoder_ids_BD, use_cache=False).logits
        else:
            found = _decoded(model, seen, decoder_ids_BD)
        return loss_sums_in_chunks(
            "span",
            (lambda logits: logits) if head is None else (lambda hidden: head(model, hidden)),
            found.flatten(0, 1)[places_N],
            labels_BD.flatten()[places_N],
            chunk=self.settings.head_chunk,
            smoothing=self.settings.label_smoothing if model.training else 0.0,
        )


def _decoded(model: Any, seen: dict[str, Tensor], decoder_ids_BD: Tensor) -> Tensor:
    """Hidden states [B, D, H] of the decoder, before the head."""
    encoded = model.get_encoder()(**seen)
    hidden: Tensor = model.get_decoder()(
        input_ids=decoder_ids_BD,
        encoder_hidden_states=encoded.last_hidden_state,
        encoder_attention_mask=seen.get("attention_mask"),
        use_cache=False,
    ).last_hidden_state
    return hidden
