"""Answers as spans of their contexts, with the next best ones.

Enters: `question`, `context`, perhaps `id`.  Leaves: `answer` with `start` and `end` (characters of
the context), `score`, `n_best`, and `no_answer_score`.
Promises: the rules of Hugging Face's run_qa: over all windows of a context, the best start and end
logits, an end not before its start, answers of up to `max_answer_tokens`.  With a threshold, a
question has no answer (`answer` is empty) where no_answer_score - score is above it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.kinds.base import Fields, Unusable
from dist_lm.data.kinds.question_answering import (
    DOC_STRIDE,
    ContextWindow,
    clean_answers,
    clean_question,
    context_windows,
)
from dist_lm.predictors.base import Prediction, Predictor
from dist_lm.scores.answers import Answers
from dist_lm.scores.base import Counts, MetricSet
from dist_lm.tasks.base import encoder_arguments

_CANDIDATES = 20
"""Starts, and ends, of a window that are looked at, as in run_qa."""


class Span(NamedTuple):
    """A possible answer."""

    score: float
    start: int
    end: int


class Question(NamedTuple):
    """A context and its windows."""

    context: str
    windows: list[ContextWindow]


class QuestionAnsweringPredictor(Predictor):
    fields = {"question": "text", "context": "text"}

    def clean(self, fields: Fields) -> Question:
        cleaned = clean_question(fields)
        stride = self.options.doc_stride
        if stride is None:
            stride = min(int(self.trained.made.get("doc_stride", DOC_STRIDE)), self.seq_len // 4)
        windows = context_windows(cleaned["question"], cleaned["context"], self.tokenizer, self.seq_len, stride)
        if not windows:
            raise Unusable(f"the question leaves no room for its context in {self.seq_len} tokens")
        return Question(cleaned["context"], windows)

    def predict(self, cleaned: Sequence[Question]) -> list[Prediction]:
        windows = [(number, window) for number, question in enumerate(cleaned) for window in question.windows]
        judged = self.in_batches(windows, lambda item: len(item[1].ids), self._forward)
        spans: list[list[Span]] = [[] for _ in cleaned]
        nulls: list[list[float]] = [[] for _ in cleaned]
        for (number, window), (start_T, end_T) in zip(windows, judged, strict=True):
            spans[number] += self._spans(window, start_T, end_T)
            nulls[number].append(float(start_T[0] + end_T[0]))
        return [
            self._prediction(question.context, found, min(null))
            for question, found, null in zip(cleaned, spans, nulls, strict=True)
        ]

    def _forward(self, items: list[tuple[int, ContextWindow]]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Logits of starts and of ends of each window."""
        ids = [window.ids for _, window in items]
        kinds = [[int(place >= window.second_begin) for place in range(len(window.ids))] for _, window in items]
        output = self.model(**encoder_arguments(self.model, self.batch(ids, token_type_ids=kinds)))
        starts, ends = output.start_logits.float().cpu().numpy(), output.end_logits.float().cpu().numpy()
        return [(starts[row][: len(own)], ends[row][: len(own)]) for row, own in enumerate(ids)]

    def _spans(self, window: ContextWindow, start_T: NDArray[np.float32], end_T: NDArray[np.float32]) -> list[Span]:
        first, last = window.second_begin, window.second_begin + len(window.offsets)
        found = []
        for start in np.argsort(-start_T, kind="stable")[:_CANDIDATES].tolist():
            for end in np.argsort(-end_T, kind="stable")[:_CANDIDATES].tolist():
                inside = first <= start <= end < last
                if inside and end - start < self.options.max_answer_tokens:
                    begin, stop = window.offsets[start - first][0], window.offsets[end - first][1]
                    found.append(Span(float(start_T[start] + end_T[end]), begin, stop))
        return found

    def _prediction(self, context: str, spans: list[Span], null: float) -> Prediction:
        best: dict[tuple[int, int], Span] = {}
        for span in sorted(spans, reverse=True):
            best.setdefault((span.start, span.end), span)
        chosen = list(best.values())[: self.options.n_best]
        # Windows without a good span at all: the empty answer is what is left.
        top = chosen[0] if chosen else Span(null, 0, 0)
        weights = np.exp(np.array([span.score for span in chosen] or [0.0]) - top.score)
        answered = bool(chosen) and not self._null_wins(null - top.score)
        return {
            "answer": context[top.start : top.end] if answered else "",
            "start": top.start if answered else None,
            "end": top.end if answered else None,
            "score": top.score,
            "no_answer_score": null,
            "n_best": [
                {
                    "answer": context[span.start : span.end],
                    "start": span.start,
                    "end": span.end,
                    "score": span.score,
                    "probability": float(weight),
                }
                for span, weight in zip(chosen, weights / weights.sum(), strict=False)
            ],
        }

    def _null_wins(self, lead: float) -> bool:
        threshold = self.options.null_threshold
        return threshold is not None and lead > threshold

    def expected(self, fields: Fields) -> list[str]:
        answers = clean_answers(fields.get("answers"), str(fields.get("context")))
        return [answer["text"] for answer in answers]

    def metric_set(self) -> MetricSet:
        return Answers()

    def counts(self, metrics: MetricSet, prediction: Prediction, expected: Any) -> Counts:
        return metrics.counts(prediction["answer"], expected)
