"""Extractive question answering: a question, a context, and the answers as spans of the context.

Enters: records of `question`, `context` and `answers`, as SQuAD has them.  Leaves: rows of question
and window, with the answer's first and last token.
Promises: an answer that is not in its context is refused; windows overlap by `doc_stride` tokens and
cover the context; a window without the whole answer points at the row's first token, as does a
question without an answer.

Columns: tokens [capacity], length, second_begin (where the window and its special tokens begin, for
segment ids), start, end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Kind, PackedRows, PackingRules, Unusable
from dist_lm.data.manifest import Column
from dist_lm.data.ragged import padded
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError

DOC_STRIDE = 32
"""Tokens that two neighbouring windows share, unless the options say otherwise."""


@dataclass(frozen=True)
class ContextWindow:
    """A question and a part of its context as a model input."""

    ids: list[int]
    second_begin: int
    """Place of the window's first token."""
    offsets: list[tuple[int, int]]
    """Characters [start, end) of the context, for each token of the window."""


class QuestionAnswering(Kind):
    name = "question_answering"
    fields = {"question": "text", "context": "text", "answers": '{"text": [...], "answer_start": [...]}'}
    optional_fields = {"id": "name of the question"}
    options = {"doc_stride": f"tokens that two neighbouring windows share ({DOC_STRIDE})"}
    token_columns = ("tokens",)

    def check_rules(self, rules: PackingRules) -> None:
        super().check_rules(rules)
        stride = rules.options.get("doc_stride", DOC_STRIDE)
        if type(stride) is not int or not 0 <= stride < rules.seq_len // 2:
            raise ConfigError(
                f"windows of {rules.seq_len} tokens cannot share {stride}",
                where="--option doc_stride",
                do=f"Write a number below {rules.seq_len // 2}.",
            )

    def clean(self, fields: Fields, rules: PackingRules) -> dict[str, Any]:
        cleaned = clean_question(fields)
        return {**cleaned, "answers": clean_answers(checked.field(fields, "answers"), cleaned["context"])}

    def columns(self, rules: PackingRules) -> tuple[Column, ...]:
        return (
            Column("tokens", rules.token_dtype, (rules.seq_len,), lengths="length"),
            Column("length", "uint16"),
            Column("second_begin", "uint16"),
            Column("start", "uint16"),
            Column("end", "uint16"),
        )

    def pack(self, records: Sequence[Fields], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
        stride = int(rules.options.get("doc_stride", DOC_STRIDE))
        document, ordinal, ids, facts = [], [], [], []
        lost = np.zeros((len(records), 4), dtype=np.int64)
        for number, record in enumerate(records):
            windows = context_windows(record["question"], record["context"], tokenizer, rules.seq_len, stride)
            # A question so long that no window fits is a row lost, and counted.
            lost[number, 0] = not windows
            for place, window in enumerate(windows):
                document.append(number)
                ordinal.append(place)
                ids.append(window.ids)
                facts.append((window.second_begin, *answer_tokens(window, record["answers"])))
        tokens, length = padded(ids, rules.seq_len, tokenizer.pad_id, rules.token_dtype)
        second_begin, start, end = np.array(facts, dtype=np.uint16).reshape(-1, 3).T.copy()
        columns = {"tokens": tokens, "length": length, "second_begin": second_begin, "start": start, "end": end}
        return PackedRows(np.array(document, dtype=np.int64), np.array(ordinal, dtype=np.int64), columns, lost)

    def facts(self, tokenizer: Tokenizer, rules: PackingRules) -> dict[str, Any]:
        return {"doc_stride": int(rules.options.get("doc_stride", DOC_STRIDE))}


def clean_question(fields: Fields) -> dict[str, Any]:
    """Question and context of a record.  Raises Unusable."""
    question, context = checked.text(fields, "question"), checked.text(fields, "context")
    return {"id": str(fields.get("id", "")), "question": question.lstrip(), "context": context}


def clean_answers(answers: Any, context: str) -> list[dict[str, Any]]:
    """[{"text", "answer_start"}], in characters; empty where the question has no answer.  Raises Unusable."""
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise Unusable("`answers` has no lists `text` and `answer_start` of one length")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        raise Unusable("`answers` is neither a list nor {text: [...], answer_start: [...]}")
    cleaned = []
    for answer in answers:
        text, start = answer.get("text"), answer.get("answer_start")
        if not isinstance(text, str) or not text.strip() or type(start) is not int:
            raise Unusable("an answer has no `text`, or its `answer_start` is not a number")
        if start < 0 or context[start : start + len(text)] != text:
            found = context.find(text)
            where = f"it is at character {found}" if found >= 0 else "it is nowhere in it"
            raise Unusable(f"the answer `{text[:40]}` is not at character {start} of its context: {where}")
        cleaned.append({"text": text, "answer_start": start})
    return cleaned


def context_windows(
    question: str, context: str, tokenizer: Tokenizer, seq_len: int, stride: int
) -> list[ContextWindow]:
    """Inputs of up to `seq_len` tokens that cover the context; none where the question leaves no room."""
    frame = tokenizer.frame(pair=True)
    asked, told = tokenizer.encodings([question, context])
    room = seq_len - frame.size - len(asked.ids)
    if room <= stride:
        return []
    head = [*frame.prefix, *asked.ids, *frame.middle]
    windows = []
    for begin in range(0, max(len(told.ids) - stride, 1), room - stride):
        ids = told.ids[begin : begin + room]
        offsets = told.offsets[begin : begin + room]
        windows.append(ContextWindow([*head, *ids, *frame.suffix], len(head), offsets))
    return windows


def answer_tokens(window: ContextWindow, answers: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Places of the first and the last token of the first answer; (0, 0) where the window lacks it."""
    if not answers or not window.offsets:
        return 0, 0
    begin = answers[0]["answer_start"]
    end = begin + len(answers[0]["text"])
    starts = [start for start, _ in window.offsets]
    ends = [stop for _, stop in window.offsets]
    if starts[0] > begin or ends[-1] < end:
        return 0, 0
    first = max(place for place, start in enumerate(starts) if start <= begin)
    last = min(place for place, stop in enumerate(ends) if stop >= end)
    return window.second_begin + first, window.second_begin + last
