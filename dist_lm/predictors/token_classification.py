"""Tags of words, and the entities that they make, with character offsets.

Enters: `tokens` (words), or `text`, which is parted into words and signs.  Leaves: `tags` and
`entities`.  Promises: every word is tagged, in windows where the text is long; offsets count in
`text`, or in the words joined by single spaces; a predicted I- without its B- begins an entity.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Unusable
from dist_lm.data.kinds.token_classification import WordWindow, clean_tags, clean_words, word_windows
from dist_lm.predictors.attributions import Part
from dist_lm.predictors.base import Prediction, Predictor
from dist_lm.scores.base import Counts, MetricSet
from dist_lm.scores.entities import Entities, entity_types
from dist_lm.tasks.base import encoder_arguments

_WORD = re.compile(r"\w+|[^\w\s]")


class Words(NamedTuple):
    """Words of a text, each with its first character and the one after its last."""

    text: str
    words: list[str]
    spans: list[tuple[int, int]]
    is_text: bool = False
    """The record had a text, not words."""


class TokenClassificationPredictor(Predictor):
    fields = {"tokens": "the words of a text", "text": "the text instead"}

    @property
    def tags(self) -> tuple[str, ...]:
        return tuple(self.model.config.id2label[number] for number in range(self.model.config.num_labels))

    def clean(self, fields: Fields) -> Words:
        if fields.get("tokens") is None:
            text = checked.text(fields, "text")
            spans = [match.span() for match in _WORD.finditer(text)]
            return Words(text, [text[begin:end] for begin, end in spans], spans, is_text=True)
        words = clean_words(fields)
        spans, begin = [], 0
        for word in words:
            spans.append((begin, begin + len(word)))
            begin += len(word) + 1
        return Words(" ".join(words), words, spans)

    def predict(self, cleaned: Sequence[Words]) -> list[Prediction]:
        windows = [
            (number, window)
            for number, record in enumerate(cleaned)
            for window in word_windows(record.words, self.tokenizer, self.seq_len)
        ]
        guesses = self.in_batches(windows, lambda item: len(item[1].ids), self._forward)
        said: list[list[tuple[str, float]]] = [[] for _ in cleaned]
        for (number, _), guess in zip(windows, guesses, strict=True):
            said[number] += guess
        return [self._prediction(record, guess) for record, guess in zip(cleaned, said, strict=True)]

    def _forward(self, items: list[tuple[int, WordWindow]]) -> list[list[tuple[str, float]]]:
        """Tag and probability of each word of each window."""
        ids = [window.ids for _, window in items]
        inputs = self.batch(ids, token_type_ids=[[0] * len(row) for row in ids])
        logits_BTC = self.model(**encoder_arguments(self.model, inputs)).logits.float()
        shares_BT, tags_BT = torch.softmax(logits_BTC, dim=-1).max(dim=-1)
        shares, tags = shares_BT.tolist(), tags_BT.tolist()
        return [
            [
                (self.tags[tags[row][place]], shares[row][place])
                for place, starts in enumerate(window.word_start)
                if starts
            ]
            for row, (_, window) in enumerate(items)
        ]

    def explain(self, cleaned: Words, prediction: Prediction) -> list[dict[str, Any]]:
        """One explanation of each entity: of the sum of its words' logits, in the window that it begins in."""
        explanations = []
        field = "text" if cleaned.is_text else "tokens"
        for name, first, last in lenient_spans(prediction["tags"]) if entity_types(self.tags) else []:
            window = next(
                window
                for window in word_windows(cleaned.words, self.tokenizer, self.seq_len)
                if window.first_word <= first < window.first_word + window.num_words
            )
            places = word_places(window, len(self.tokenizer.frame().suffix))
            parts = [
                Part(field, *cleaned.spans[word], cleaned.words[word], places[word - window.first_word])
                for word in range(window.first_word, window.first_word + window.num_words)
            ]
            judged = [
                (places[word - window.first_word][0], self.tags.index(prediction["tags"][word]))
                for word in range(first, min(last + 1, window.first_word + window.num_words))
            ]
            told = {place for part in parts for place in part.tokens}
            inputs = self.batch([window.ids], token_type_ids=[[0] * len(window.ids)])
            found = self.attributor.of(
                encoder_arguments(self.model, inputs),
                [place in told for place in range(len(window.ids))],
                partial(_sum_of_logits, judged),
            )
            start, end = cleaned.spans[first][0], cleaned.spans[last][1]
            explanations.append(found.told(f"{name}: {cleaned.text[start:end]}", parts))
        return explanations

    def _prediction(self, record: Words, guess: list[tuple[str, float]]) -> Prediction:
        tags = [tag for tag, _ in guess]
        prediction: Prediction = {"tags": tags}
        if entity_types(self.tags):
            prediction["entities"] = [
                {
                    "type": name,
                    "start": record.spans[first][0],
                    "end": record.spans[last][1],
                    "text": record.text[record.spans[first][0] : record.spans[last][1]],
                    "probability": min(share for _, share in guess[first : last + 1]),
                }
                for name, first, last in lenient_spans(tags)
            ]
        return prediction

    def expected(self, fields: Fields) -> list[str]:
        tags = clean_tags(fields, clean_words(fields))
        for number, tag in enumerate(tags):
            if tag not in self.tags:
                raise Unusable(f"the model does not know tag {number} `{tag}`; it knows {', '.join(self.tags)}")
        return tags

    def metric_set(self) -> MetricSet:
        return Entities(self.tags)

    def counts(self, metrics: MetricSet, prediction: Prediction, expected: Any) -> Counts:
        return metrics.counts(prediction["tags"], expected)


def word_places(window: WordWindow, suffix: int) -> list[list[int]]:
    """Places of each word's tokens; `suffix` special tokens end the window."""
    begins = [place for place, starts in enumerate(window.word_start) if starts]
    ends = [*begins[1:], len(window.ids) - suffix]
    return [list(range(begin, end)) for begin, end in zip(begins, ends, strict=True)]


def lenient_spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Type, first and last word of each entity; a reader wants those too that lack their B-."""
    spans: list[tuple[str, int, int]] = []
    before = "O"
    for place, tag in enumerate(tags):
        if tag[:2] == "I-" and before[2:] == tag[2:]:
            name, first, _ = spans.pop()
            spans.append((name, first, place))
        elif tag[:2] in ("B-", "I-"):
            spans.append((tag[2:], place, place))
        before = tag
    return spans


def _sum_of_logits(judged: Sequence[tuple[int, int]], logits_BTC: torch.Tensor) -> torch.Tensor:
    """`judged`: place and tag of each word."""
    return torch.stack([logits_BTC[:, place, tag] for place, tag in judged]).sum(dim=0)
