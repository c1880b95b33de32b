"""Text that a model writes: translations, summaries, continuations, answers to instructions.

Enters: `source`, `text`, or `prompt` / `messages`.  Leaves: `text`, and the candidates of a beam.
Promises: greedy with one beam, else beam search; nothing is sampled, so the same record gives the
same text; special tokens are not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Unusable
from dist_lm.data.kinds.chat import ASSISTANT, ChatTemplate, encode_chat, encode_prompt, load_template
from dist_lm.data.kinds.instruction import clean_dialogue
from dist_lm.data.kinds.seq2seq import cut, framed
from dist_lm.predictors.base import Prediction, Predictor
from dist_lm.scores.base import Counts, MetricSet
from dist_lm.scores.generated import Generated, LanguageModelling


class Seq2SeqPredictor(Predictor):
    fields = {"source": "a text"}

    def clean(self, fields: Fields) -> list[int]:
        text = str(self.trained.made.get("prefix", "")) + checked.text(fields, "source")
        return cut(framed([text], self.tokenizer)[0], self.seq_len, self.tokenizer.frame().suffix)

    def predict(self, cleaned: Sequence[list[int]]) -> list[Prediction]:
        return self.in_batches(cleaned, len, self._generate)

    def _generate(self, rows: list[list[int]]) -> list[Prediction]:
        written = self.model.generate(**self.batch(rows), **generation_settings(self))
        return [{"text": self.tokenizer.text_of(ids).strip()} for ids in written.tolist()]

    def expected(self, fields: Fields) -> str:
        return checked.text(fields, "target")

    def metric_set(self) -> MetricSet:
        return Generated(self.options.bleu_tokenize)

    def counts(self, metrics: MetricSet, prediction: Prediction, expected: Any) -> Counts:
        return metrics.counts(prediction["text"], expected)


class ContinuationPredictor(Predictor):
    """Continues a text; judged by how well it foresees the text itself."""

    fields = {"text": "the beginning of a text"}
    foresees = True

    def clean(self, fields: Fields) -> list[int]:
        ids = self.tokenizer.encode_batch([checked.text(fields, "text")])[0]
        frame = self.tokenizer.frame()
        # The room for what is written is taken from the beginning of the text.
        room = max(self.seq_len - self.options.max_new_tokens - len(frame.prefix), 1)
        return [*frame.prefix, *ids[-room:]]

    def predict(self, cleaned: Sequence[list[int]]) -> list[Prediction]:
        return self.in_batches(cleaned, len, self._generate)

    def _generate(self, rows: list[list[int]]) -> list[Prediction]:
        # Padding stands before the text, so that every row goes on at the same place.
        inputs = self.batch([row[::-1] for row in rows])
        inputs = {name: tensor.flip(1) for name, tensor in inputs.items()}
        written = self.model.generate(**inputs, **generation_settings(self))
        new = written[:, inputs["input_ids"].shape[1] :]
        return [{"text": self.tokenizer.text_of(ids)} for ids in new.tolist()]

    def expected(self, fields: Fields) -> list[tuple[list[int], list[bool]]]:
        """Windows of the text, each with the places that are judged: all but the first."""
        ids = self.tokenizer.encode_batch([checked.text(fields, "text")])[0]
        if len(ids) < 2:
            raise Unusable("field 'text' is shorter than two tokens: nothing to foresee")
        windows = [ids[begin : begin + self.seq_len] for begin in range(0, len(ids), self.seq_len)]
        return [(window, [place > 0 for place in range(len(window))]) for window in windows]

    def metric_set(self) -> MetricSet:
        return LanguageModelling()

    def judge(self, expected: Sequence[list[tuple[list[int], list[bool]]]]) -> list[Prediction]:
        """Sums over the judged tokens of each record, nothing being written."""
        windows = [(number, *window) for number, record in enumerate(expected) for window in record]
        sums = self.in_batches(windows, lambda item: len(item[1]), self._judge_windows)
        totals = [{"loss": 0.0, "right": 0, "tokens": 0} for _ in expected]
        for (number, _, judged), (loss, right) in zip(windows, sums, strict=True):
            totals[number]["loss"] += loss
            totals[number]["right"] += right
            totals[number]["tokens"] += sum(judged)
        return [dict(total) for total in totals]

    def _judge_windows(self, items: list[tuple[int, list[int], list[bool]]]) -> list[tuple[float, int]]:
        inputs = self.batch([ids for _, ids, _ in items], judged=[[int(one) for one in own] for _, _, own in items])
        judged_BT = inputs.pop("judged")[:, 1:] > 0
        labels_BT = torch.where(judged_BT, inputs["input_ids"][:, 1:], -100)
        logits_BTV = self.model(**inputs).logits[:, :-1].float()
        losses = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none", ignore_index=-100)
        right_BT = (logits_BTV.argmax(dim=-1) == labels_BT) & judged_BT
        sums = losses.view_as(labels_BT).sum(dim=1).tolist()
        return list(zip(sums, right_BT.sum(dim=1).tolist(), strict=True))

    def counts(self, metrics: MetricSet, prediction: Prediction, expected: Any) -> Counts:
        return metrics.counts((prediction["loss"], prediction["right"]), prediction["tokens"])


class InstructionPredictor(ContinuationPredictor):
    """Answers an instruction; judged by how well it foresees the answers of the record."""

    fields = {"prompt": "an instruction", "messages": "a dialogue instead, a list of {role, content}"}

    @cached_property
    def template(self) -> ChatTemplate:
        return load_template(self.tokenizer.path)

    def clean(self, fields: Fields) -> list[int]:
        messages = clean_dialogue(fields)
        if fields.get("messages") is None or messages[-1]["role"] == ASSISTANT:
            # What the record says was answered is not shown.
            messages = messages[:-1] if messages[-1]["role"] == ASSISTANT else messages
        if not messages:
            raise Unusable("the dialogue holds an answer alone")
        ids = encode_prompt(messages, self.template, self.tokenizer)
        return ids[-max(self.seq_len - self.options.max_new_tokens, 1) :]

    def _generate(self, rows: list[list[int]]) -> list[Prediction]:
        return [{"text": prediction["text"].strip()} for prediction in super()._generate(rows)]

    def expected(self, fields: Fields) -> list[tuple[list[int], list[bool]]]:
        pieces = encode_chat(clean_dialogue(fields), self.template, self.tokenizer)
        ids = [number for piece, _ in pieces for number in piece][: self.seq_len]
        answer = [is_answer for piece, is_answer in pieces for _ in piece][: self.seq_len]
        answer[:1] = [False]
        if not any(answer):
            raise Unusable(f"no answer within {self.seq_len} tokens")
        return [(ids, answer)]


def generation_settings(predictor: Predictor) -> dict[str, Any]:
    """Settings of transformers' generate: greedy or beams, never sampling."""
    tokenizer, options = predictor.tokenizer, predictor.options
    config = predictor.model.generation_config
    end = config.eos_token_id
    if end is None:
        end = tokenizer.special.get("eos_token", tokenizer.special.get("sep_token"))
    return {
        "do_sample": False,
        "num_beams": options.beams,
        "max_new_tokens": options.max_new_tokens,
        "eos_token_id": end,
        "pad_token_id": tokenizer.pad_id,
    }
