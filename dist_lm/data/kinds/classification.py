"""Kind `classification`: a text, or a pair of texts, and what is to be said of it.

Enters: texts and labels.  Leaves: a row each, cut off at the end where it is too long: of a pair the
longer text gives way.
Promises: labels are numbered in sorted order; what is no label of the kind asked for is refused.

    --option labels=one      `label`: int32, the class (default)
    --option labels=many     `labels`: int32 [capacity], filled to `num_labels`: the classes that hold
    --option labels=number   `target`: float32, for regression
    --option labels=none     no label: texts to predict
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Kind, PackedRows, PackingRules, Unusable
from dist_lm.data.manifest import Column
from dist_lm.data.ragged import padded
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError

_PROBLEM_TYPES = {
    "one": "single_label_classification",
    "many": "multi_label_classification",
    "number": "regression",
    "none": "none",
}
_MOST_LABELS_A_TEXT = 32


class Classification(Kind):
    name = "classification"
    fields = {"text": "a text", "label": "a class, a list of classes, or a number (--option labels)"}
    optional_fields = {"text_pair": "a second text, such as a hypothesis"}
    options = {
        "labels": "one class (default), many classes, a number, or none",
        "text_pair": "true: every record has a second text in field `text_pair`",
    }
    token_columns = ("tokens", "first", "second")
    label_columns = ("label", "labels")

    def check_rules(self, rules: PackingRules) -> None:
        super().check_rules(rules)
        if rules.options.get("labels", "one") not in _PROBLEM_TYPES:
            raise ConfigError(
                f"labels `{rules.options['labels']}` are unknown",
                where="--option labels",
                do=f"Write one of {', '.join(_PROBLEM_TYPES)}.",
            )

    def clean(self, fields: Fields, rules: PackingRules) -> dict[str, Any]:
        cleaned: dict[str, Any] = {"text": checked.text(fields, "text")}
        if _paired(rules):
            cleaned["text_pair"] = checked.text(fields, "text_pair")
        match _labels(rules):
            case "one":
                cleaned["label"] = checked.label(fields, "label")
            case "many":
                cleaned["label"] = checked.labels(fields, "label")
                if len(cleaned["label"]) > _MOST_LABELS_A_TEXT:
                    raise Unusable(f"{len(cleaned['label'])} labels, and {_MOST_LABELS_A_TEXT} fit")
            case "number":
                cleaned["label"] = checked.number(fields, "label")
        return cleaned

    def columns(self, rules: PackingRules) -> tuple[Column, ...]:
        if _paired(rules):
            capacity = rules.seq_len - 3
            text = [
                Column("first", rules.token_dtype, (capacity,), lengths="first_length"),
                Column("second", rules.token_dtype, (capacity,), lengths="second_length"),
                Column("first_length", "uint16"),
                Column("second_length", "uint16"),
            ]
        else:
            text = [
                Column("tokens", rules.token_dtype, (rules.seq_len - 2,), lengths="length"),
                Column("length", "uint16"),
            ]
        label = {
            "one": [Column("label", "int32")],
            "many": [
                Column("labels", "int32", (_MOST_LABELS_A_TEXT,), lengths="num_labels"),
                Column("num_labels", "uint16"),
            ],
            "number": [Column("target", "float32")],
            "none": list[Column](),
        }
        return (*text, *label[_labels(rules)])

    def pack(self, records: Sequence[Fields], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
        firsts = tokenizer.encode_batch([record["text"] for record in records])
        paired = _paired(rules)
        seconds: Any = repeat([])
        if paired:
            seconds = tokenizer.encode_batch([record["text_pair"] for record in records])
        # Never more than the columns hold; less where a tokenizer puts in more special tokens than BERT's.
        room = rules.seq_len - max(tokenizer.frame(pair=paired).size, 3 if paired else 2)
        capacity = rules.seq_len - (3 if paired else 2)
        lost = np.zeros((len(records), 4), dtype=np.int64)
        kept: list[tuple[list[int], list[int]]] = []
        documents: list[int] = []
        for document, (first, second) in enumerate(zip(firsts, seconds, strict=paired)):
            tokens = len(first) + len(second)
            if tokens < rules.min_tokens:
                lost[document, :2] = (1, tokens)
                continue
            if tokens > room:
                lost[document, 2:] = (1, tokens - room)
            kept.append(cut_longer_first(first, second, room))
            documents.append(document)
        pad, dtype = tokenizer.pad_id, rules.token_dtype
        columns: dict[str, NDArray[Any]] = {}
        first_names = ("first", "first_length") if paired else ("tokens", "length")
        columns.update(zip(first_names, padded([first for first, _ in kept], capacity, pad, dtype), strict=True))
        if paired:
            names = ("second", "second_length")
            columns.update(zip(names, padded([second for _, second in kept], capacity, pad, dtype), strict=True))
        label_columns, labels = _label_columns([records[document] for document in documents], rules)
        ordinal = np.zeros(len(kept), dtype=np.int64)
        return PackedRows(np.array(documents, dtype=np.int64), ordinal, columns | label_columns, lost, labels)

    def facts(self, tokenizer: Tokenizer, rules: PackingRules) -> dict[str, Any]:
        return {"problem_type": _PROBLEM_TYPES[_labels(rules)], "text_pair": _paired(rules)}


def cut_longer_first(first: list[int], second: list[int], room: int) -> tuple[list[int], list[int]]:
    """The beginnings of both, at most `room` tokens together; the shorter is left whole where it can be."""
    half = room // 2
    second_length = min(len(second), max(half, room - len(first)))
    return first[: room - second_length], second[:second_length]


def _label_columns(records: Sequence[Fields], rules: PackingRules) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """The columns that hold the labels, and the names that they number."""
    match _labels(rules):
        case "one":
            names = tuple(sorted({record["label"] for record in records}))
            number = {name: place for place, name in enumerate(names)}
            return {"label": np.array([number[record["label"]] for record in records], dtype=np.int32)}, names
        case "many":
            names = tuple(sorted({name for record in records for name in record["label"]}))
            number = {name: place for place, name in enumerate(names)}
            numbers = [[number[name] for name in record["label"]] for record in records]
            labels, num_labels = padded(numbers, _MOST_LABELS_A_TEXT, -1, np.int32)
            return {"labels": labels, "num_labels": num_labels}, names
        case "number":
            return {"target": np.array([record["label"] for record in records], dtype=np.float32)}, ()
    return {}, ()


def _labels(rules: PackingRules) -> str:
    return str(rules.options.get("labels", "one"))


def _paired(rules: PackingRules) -> bool:
    return bool(rules.options.get("text_pair", False))
