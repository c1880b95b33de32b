"""JSON files: a list of objects, or questions and answers in the layout of SQuAD.

Enters: `[{...}, ...]`, or `{"data": [{"paragraphs": [{"context", "qas": [...]}]}]}`.
Leaves: the objects; or records of `id`, `question`, `context`, `answers` ({"text": [...],
"answer_start": [...]}, both empty for a question without an answer).  Memory: the whole file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dist_lm.data.location import redact
from dist_lm.data.sources.files import reading
from dist_lm.data.sources.format import Format, ReadSettings, Split
from dist_lm.data.sources.lines import decode, without_mark
from dist_lm.data.sources.record import BadRecords, Record, Where
from dist_lm.errors import DataError


class JsonFile(Format):
    name = "json"
    suffixes = (".json",)

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        with reading(split.location) as file:
            text = decode(without_mark(file.read()), Where(split.location, 1), bad)
        if text is None:
            return
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _unknown(split.location, str(error)) from None
        if isinstance(content, list):
            yield from _listed(content, split.location, bad)
        elif isinstance(content, dict) and isinstance(content.get("data"), list):
            yield from _questions(content["data"], split.location, bad)
        else:
            raise _unknown(split.location, "It holds neither a list of objects nor `data`, as SQuAD has it.")


def _listed(items: list[Any], location: str, bad: BadRecords) -> Iterator[Record]:
    for number, item in enumerate(items, 1):
        where = Where(location, f"item {number}")
        if isinstance(item, dict):
            yield Record(item, where)
        else:
            bad.add(where, f"a JSON object was expected, not {type(item).__name__}")


def _questions(articles: list[Any], location: str, bad: BadRecords) -> Iterator[Record]:
    for number, article in enumerate(articles, 1):
        try:
            paragraphs = article["paragraphs"]
            pairs = [(paragraph["context"], question) for paragraph in paragraphs for question in paragraph["qas"]]
        except (KeyError, TypeError) as error:
            bad.add(Where(location, f"article {number}"), f"not the layout of SQuAD: {error!r}")
            continue
        for context, question in pairs:
            try:
                answers = question.get("answers", [])
                fields = {
                    "id": str(question["id"]),
                    "question": question["question"],
                    "context": context,
                    "answers": {
                        "text": [answer["text"] for answer in answers],
                        "answer_start": [answer["answer_start"] for answer in answers],
                    },
                }
            except (KeyError, TypeError, AttributeError) as error:
                bad.add(Where(location, f"article {number}"), f"a question is not as SQuAD has it: {error!r}")
                continue
            yield Record(fields, Where(location, f"question {fields['id']}"))


def _unknown(location: str, why: str) -> DataError:
    return DataError(
        "a JSON file cannot be used",
        where=redact(location),
        why=why,
        do='Write one object a line (.jsonl), a list of objects, or {"data": [...]} in the layout of SQuAD.',
    )
