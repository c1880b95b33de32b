"""A text and what it becomes: translation, summarisation, and whatever else maps text to text.

Enters: records of `source` and `target`.  Leaves: rows of both, as the model reads them.
Promises: a prefix that a model wants, such as "translate English to German: ", is part of the row
and of the data set's facts; what does not fit is cut at the end, and counted.

Columns: source [capacity], source_length, target [capacity], target_length, special tokens included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Kind, PackedRows, PackingRules
from dist_lm.data.manifest import Column
from dist_lm.data.ragged import padded
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError

_SHORTEST_TARGET = 4


class Seq2Seq(Kind):
    name = "seq2seq"
    fields = {"source": "the text that is given", "target": "the text that is wanted"}
    options = {
        "prefix": "words before every source, such as 'translate English to German: '",
        "target_len": "tokens of a target, special tokens included (as many as of a source)",
    }
    token_columns = ("source", "target")

    def check_rules(self, rules: PackingRules) -> None:
        super().check_rules(rules)
        if type(target_len(rules)) is not int or target_len(rules) < _SHORTEST_TARGET:
            raise ConfigError(
                f"targets of {target_len(rules)} tokens cannot be",
                where="--option target_len",
                do=f"Write a number of {_SHORTEST_TARGET} or more.",
            )

    def clean(self, fields: Fields, rules: PackingRules) -> dict[str, Any]:
        return {"source": checked.text(fields, "source"), "target": checked.text(fields, "target")}

    def columns(self, rules: PackingRules) -> tuple[Column, ...]:
        return (
            Column("source", rules.token_dtype, (rules.seq_len,), lengths="source_length"),
            Column("source_length", "uint16"),
            Column("target", rules.token_dtype, (target_len(rules),), lengths="target_length"),
            Column("target_length", "uint16"),
        )

    def pack(self, records: Sequence[Fields], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
        prefix = str(rules.options.get("prefix", ""))
        suffix = tokenizer.frame().suffix
        lost = np.zeros((len(records), 4), dtype=np.int64)
        columns: dict[str, Any] = {}
        for name, start, capacity in (("source", prefix, rules.seq_len), ("target", "", target_len(rules))):
            rows = framed([start + record[name] for record in records], tokenizer)
            for number, row in enumerate(rows):
                lost[number, 2:] += (len(row) > capacity, max(len(row) - capacity, 0))
            rows = [cut(row, capacity, suffix) for row in rows]
            columns[name], columns[f"{name}_length"] = padded(rows, capacity, tokenizer.pad_id, rules.token_dtype)
        count = len(records)
        return PackedRows(np.arange(count, dtype=np.int64), np.zeros(count, dtype=np.int64), columns, lost)

    def facts(self, tokenizer: Tokenizer, rules: PackingRules) -> dict[str, Any]:
        return {"prefix": str(rules.options.get("prefix", "")), "target_len": target_len(rules)}


def target_len(rules: PackingRules) -> int:
    """Tokens of a target, special tokens included."""
    length: int = rules.options.get("target_len", rules.seq_len)
    return length


def framed(texts: Sequence[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token numbers of each text between the tokenizer's special tokens."""
    frame = tokenizer.frame()
    return [[*frame.prefix, *ids, *frame.suffix] for ids in tokenizer.encode_batch(list(texts))]


def cut(row: list[int], capacity: int, suffix: Sequence[int]) -> list[int]:
    """The row without the end of its text where it is too long; its last special tokens stay."""
    return row if len(row) <= capacity else [*row[: capacity - len(suffix)], *suffix]
