"""Kind `pairs`: rows of two segments that follow each other in one document, for MLM with NSP.

Enters: texts.  Leaves: rows [CLS] first [SEP] second [SEP], without the special tokens.
Promises: the rows of a document hold all its tokens in order; both segments hold a token, unless the
document has only one.  Segments end at a sentence end where that wastes little room, and are
otherwise filled to the last token.
"""

from __future__ import annotations

import re
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, islice
from typing import Any, NamedTuple

import numpy as np

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Kind, PackedRows, PackingRules
from dist_lm.data.manifest import Column
from dist_lm.data.ragged import padded
from dist_lm.data.tokenizer import Tokenizer

_SPECIAL_TOKENS = 3
# A segment that is this full ends at the last sentence end inside it; an emptier one is filled to
# the last token and its last sentence goes on in the next segment.
_FULL_ENOUGH = 7 / 8
_PARAGRAPH_END = re.compile(r"\n[^\S\n]*\n\s*")
_SENTENCE_END = re.compile(
    # Latin and Greek: a full stop, space, and something that can begin a sentence.
    r"(?<=[.!?;:])[^\S\n]*\s+(?=[\"'(\[`*]*[A-Z0-9\u00c0-\u00de\u0386-\u03ab\u0410-\u042f])"
    # Chinese and Japanese have no space between sentences.
    r"|(?<=[\u3002\uff01\uff1f])"
)


class Pairs(Kind):
    name = "pairs"
    fields = {"text": "a document"}
    token_columns = ("first", "second")
    min_tokens = 8

    def clean(self, fields: Fields, rules: PackingRules) -> dict[str, Any]:
        return {"text": checked.text(fields, "text")}

    def content(self, cleaned: Fields) -> str:
        return str(cleaned["text"])

    def columns(self, rules: PackingRules) -> tuple[Column, ...]:
        first, second = _capacities(rules)
        return (
            Column("first", rules.token_dtype, (first,), lengths="first_length"),
            Column("second", rules.token_dtype, (second,), lengths="second_length"),
            Column("first_length", "uint16"),
            Column("second_length", "uint16"),
            Column("document", "uint32"),
        )

    def pack(self, records: Sequence[Fields], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
        units_of = [split_units(record["text"]) for record in records]
        encoded = iter(tokenizer.encode_batch(list(chain.from_iterable(units_of))))
        capacities = _capacities(rules)
        documents: list[int] = []
        ordinals: list[int] = []
        firsts: list[list[int]] = []
        seconds: list[list[int]] = []
        lost = np.zeros((len(records), 4), dtype=np.int64)
        for document, units in enumerate(units_of):
            ids_of_units = [ids for ids in islice(encoded, len(units)) if ids]
            ids = list(chain.from_iterable(ids_of_units))
            ends = list(accumulate(map(len, ids_of_units)))
            ordinal = 0
            for start, middle, end in pair_spans(ends, *capacities):
                if end - start < rules.min_tokens:
                    lost[document, :2] += (1, end - start)
                    continue
                documents.append(document)
                ordinals.append(ordinal)
                firsts.append(ids[start:middle])
                seconds.append(ids[middle:end])
                ordinal += 1
        first, first_length = padded(firsts, capacities[0], tokenizer.pad_id, rules.token_dtype)
        second, second_length = padded(seconds, capacities[1], tokenizer.pad_id, rules.token_dtype)
        # Tells rows of one document from others: NSP wants a partner from another one.
        names = np.array([zlib.crc32(record["text"].encode()) for record in records], dtype=np.uint32)
        document_of = np.array(documents, dtype=np.int64)
        columns = {
            "first": first,
            "second": second,
            "first_length": first_length,
            "second_length": second_length,
            "document": names[document_of],
        }
        return PackedRows(document_of, np.array(ordinals, dtype=np.int64), columns, lost)


def _capacities(rules: PackingRules) -> tuple[int, int]:
    """Tokens that the two segments hold."""
    first = (rules.seq_len - _SPECIAL_TOKENS) // 2
    return first, rules.seq_len - _SPECIAL_TOKENS - first


def split_units(text: str) -> list[str]:
    """Sentences, or what comes closest: a unit never crosses a blank line."""
    paragraphs = _PARAGRAPH_END.split(text)
    units = chain.from_iterable(_SENTENCE_END.split(paragraph) for paragraph in paragraphs)
    return [unit for unit in units if unit and not unit.isspace()]


class Span(NamedTuple):
    """One row of a pair: tokens [start, middle) and [middle, end) of a document."""

    start: int
    middle: int
    end: int


def pair_spans(unit_ends: Sequence[int], first_capacity: int, second_capacity: int) -> list[Span]:
    """Rows of a document whose units end at the given token offsets (increasing).

    The spans cover all tokens in order, without gaps; both segments of each hold a token, unless
    the document has only one.
    """
    total = unit_ends[-1] if unit_ends else 0
    spans = []
    start = 0
    while total - start > first_capacity + second_capacity:
        middle = _segment_end(unit_ends, start, first_capacity)
        end = _segment_end(unit_ends, middle, second_capacity)
        spans.append(Span(start, middle, end))
        start = end
    if start < total:
        spans.append(Span(start, _tail_middle(unit_ends, start, first_capacity, second_capacity), total))
    return spans


def _segment_end(unit_ends: Sequence[int], start: int, capacity: int) -> int:
    at = bisect_right(unit_ends, start + capacity) - 1
    if at >= 0 and unit_ends[at] - start >= _FULL_ENOUGH * capacity:
        return unit_ends[at]
    return start + capacity


def _tail_middle(unit_ends: Sequence[int], start: int, first_capacity: int, second_capacity: int) -> int:
    """Where the rest of a document, which fits into one row, is parted: the unit end nearest its middle."""
    total = unit_ends[-1]
    lowest, highest = max(start + 1, total - second_capacity), min(start + first_capacity, total - 1)
    middle = (start + total) // 2
    at = bisect_right(unit_ends, middle)
    near = [end for end in unit_ends[max(at - 1, 0) : at + 1] if lowest <= end <= highest]
    if near:
        return min(near, key=lambda end: abs(end - middle))
    return min(max(middle, lowest), max(highest, lowest))
