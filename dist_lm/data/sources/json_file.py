"""JSON files: a list of objects, or questions and answers in the layout of SQuAD.

Enters: `[{...}, ...]`, or `{"data": [{"paragraphs": [{"context", "qas": [...]}]}]}`.
Leaves: the objects; or records of `id`, `question`, `context`, `answers` ({"text": [...],
"answer_start": [...]}, both empty for a question without an answer).  Memory: one object, or one article.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any, cast

import ijson

from dist_lm.data.location import redact
from dist_lm.data.sources.files import reading
from dist_lm.data.sources.format import Format, ReadSettings, Split
from dist_lm.data.sources.lines import BYTE_ORDER_MARK
from dist_lm.data.sources.record import BadRecords, Record, Where
from dist_lm.errors import DataError

_NOTHING_USABLE = "It holds neither a list of objects nor a list `data`, as SQuAD has it."
_MAX_DEPTH = 100


class JsonFile(Format):
    name = "json"
    suffixes = (".json",)

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        with reading(split.location) as opened:
            file = cast(io.BufferedReader, opened)
            try:
                match _first_sign(file):
                    case b"[":
                        yield from _listed(_elements(file, split.location, key=None), split.location, bad)
                    case b"{":
                        yield from _questions(_elements(file, split.location, key="data"), split.location, bad)
                    case _:
                        raise _unknown(split.location, _NOTHING_USABLE)
            except ijson.JSONError as error:
                raise _unknown(split.location, str(error)) from None


def _first_sign(file: io.BufferedReader) -> bytes:
    """The first byte that is neither a mark of the encoding nor blank; it is not taken out of the file."""
    if file.peek(len(BYTE_ORDER_MARK)).startswith(BYTE_ORDER_MARK):
        file.read(len(BYTE_ORDER_MARK))
    while (sign := file.peek(1)[:1]).isspace():
        file.read(1)
    return sign


def _elements(file: io.BufferedReader, location: str, *, key: str | None) -> Iterator[Any]:
    """The elements of the list that is the file, or that stands under a key of the object that is the file.

    ijson.items would do, but its paths make the memory grow with the square of the nesting.
    """
    level = 1 if key is None else 2
    depth, inside, current_key = 0, False, None
    builder = ijson.ObjectBuilder()
    for event, value in ijson.basic_parse(file, use_float=True):
        opens = event in ("start_array", "start_map")
        depth -= event in ("end_array", "end_map")
        if inside and depth >= level:
            builder.event(event, value)
            if depth == level and not opens:
                yield builder.value
                builder = ijson.ObjectBuilder()
        elif depth == level - 1:
            current_key = value if event == "map_key" else current_key
            inside = event == "start_array" and current_key == key
        depth += opens
        if depth > _MAX_DEPTH:
            raise _unknown(location, f"It is nested more than {_MAX_DEPTH} deep.")


def _listed(items: Iterable[Any], location: str, bad: BadRecords) -> Iterator[Record]:
    for number, item in enumerate(items, 1):
        where = Where(location, f"item {number}")
        if isinstance(item, dict):
            yield Record(item, where)
        else:
            bad.add(where, f"a JSON object was expected, not {type(item).__name__}")


def _questions(articles: Iterable[Any], location: str, bad: BadRecords) -> Iterator[Record]:
    number = 0
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
    if not number:
        raise _unknown(location, _NOTHING_USABLE)


def _unknown(location: str, why: str) -> DataError:
    return DataError(
        "a JSON file cannot be used",
        where=redact(location),
        why=why,
        do='Write one object a line (.jsonl), a list of objects, or {"data": [...]} in the layout of SQuAD.',
    )
