"""Documents as rows of token numbers: the part of preparation that runs side by side.

Enters: the texts of some documents, and the rules.  Leaves: PackedRows, arrays of rows that say
which document each row is of, and counts of what did not become a row.
Promises: a pure function of texts, tokenizer and rules, light to import: it runs in this process, in
a pool, or as a task on another machine, with the same result.

Rows of kind "pairs" hold two segments that follow each other in one document.  Segments end at a
sentence end where that wastes little room, and are otherwise filled to the last token.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.tokenizer import Tokenizer, load_tokenizer

Kind = Literal["pairs", "classification"]

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


@dataclass(frozen=True)
class PackingRules:
    """What rows look like."""

    kind: Kind
    seq_len: int
    """Tokens of a model input, special tokens included."""
    min_tokens: int
    """Rows with fewer are dropped."""
    token_dtype: Literal["uint16", "uint32"]

    @property
    def segment_capacity(self) -> tuple[int, int]:
        """Tokens that the two segments of a pair hold: [CLS] first [SEP] second [SEP]."""
        first = (self.seq_len - 3) // 2
        return first, self.seq_len - 3 - first

    @property
    def token_capacity(self) -> int:
        """Tokens that a row of the kind holds."""
        return self.seq_len - (3 if self.kind == "pairs" else 2)


@dataclass
class PackedRows:
    """Rows of some documents, in the order of the documents."""

    document: NDArray[np.int64]
    """For each row: which of the documents it is of."""
    ordinal: NDArray[np.int64]
    """For each row: its number inside the document."""
    columns: dict[str, NDArray[Any]]
    lost: NDArray[np.int64]
    """[documents, 4]: rows too short, tokens in them, rows truncated, tokens cut off."""


def pack_documents(texts: Sequence[str], tokenizer_path: Path, rules: PackingRules) -> PackedRows:
    """The rows of the documents.  The tokenizer is loaded once a process."""
    tokenizer = _tokenizer_at(tokenizer_path)
    if rules.kind == "pairs":
        return _pack_pairs(texts, tokenizer, rules)
    return _pack_whole(texts, tokenizer, rules)


_tokenizer_at = lru_cache(maxsize=1)(load_tokenizer)


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


def _pack_pairs(texts: Sequence[str], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
    units_of = [split_units(text) for text in texts]
    encoded = iter(tokenizer.encode_batch(list(chain.from_iterable(units_of))))
    capacities = rules.segment_capacity
    documents: list[int] = []
    ordinals: list[int] = []
    firsts: list[list[int]] = []
    seconds: list[list[int]] = []
    lost = np.zeros((len(texts), 4), dtype=np.int64)
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
    first, first_length = _padded(firsts, capacities[0], tokenizer.pad_id, rules.token_dtype)
    second, second_length = _padded(seconds, capacities[1], tokenizer.pad_id, rules.token_dtype)
    columns = {"first": first, "second": second, "first_length": first_length, "second_length": second_length}
    return PackedRows(np.array(documents, dtype=np.int64), np.array(ordinals, dtype=np.int64), columns, lost)


def _pack_whole(texts: Sequence[str], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
    documents: list[int] = []
    rows: list[list[int]] = []
    lost = np.zeros((len(texts), 4), dtype=np.int64)
    for document, ids in enumerate(tokenizer.encode_batch(list(texts))):
        if len(ids) < rules.min_tokens:
            lost[document, :2] = (1, len(ids))
            continue
        if len(ids) > rules.token_capacity:
            lost[document, 2:] = (1, len(ids) - rules.token_capacity)
        documents.append(document)
        rows.append(ids[: rules.token_capacity])
    tokens, length = _padded(rows, rules.token_capacity, tokenizer.pad_id, rules.token_dtype)
    ordinal = np.zeros(len(rows), dtype=np.int64)
    return PackedRows(np.array(documents, dtype=np.int64), ordinal, {"tokens": tokens, "length": length}, lost)


def _padded(rows: list[list[int]], capacity: int, pad_id: int, dtype: str) -> tuple[NDArray[Any], NDArray[np.uint16]]:
    """The rows as one array, padded at the end, and their lengths."""
    lengths = np.fromiter(map(len, rows), dtype=np.uint16, count=len(rows))
    padded = np.full((len(rows), capacity), pad_id, dtype=dtype)
    if rows:
        filled = np.arange(capacity) < lengths[:, None]
        padded[filled] = np.fromiter(chain.from_iterable(rows), dtype=dtype, count=int(lengths.sum()))
    return padded, lengths
