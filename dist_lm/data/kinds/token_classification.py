"""Token classification: a tag for every word, such as the names of a text in IOB2.

Enters: records of `tokens` (words) and `tags`.  Leaves: rows of token numbers, where each word
begins, and the word's tag.
Promises: tags that break IOB2 are refused with the reason; a text longer than a row goes on in the
next one, parted between words, so that no word is lost.

Columns: tokens and word_start [capacity], length; tag [capacity], num_words.  A row holds special
tokens too.  Which tokens of a word carry its tag is decided by the task.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Empty, Fields, Kind, PackedRows, PackingRules, Unusable
from dist_lm.data.manifest import Column
from dist_lm.data.ragged import padded
from dist_lm.data.tokenizer import Tokenizer

OUTSIDE = "O"


@dataclass(frozen=True)
class WordWindow:
    """Some words of a text as a model input."""

    ids: list[int]
    word_start: list[int]
    """1 at the first token of each word."""
    first_word: int
    num_words: int
    cut_tokens: int
    """Tokens of a word that alone is longer than a row."""


class TokenClassification(Kind):
    name = "token_classification"
    fields = {"tokens": "the words of a text, a list of strings", "tags": "a tag for each word, such as B-PER"}
    token_columns = ("tokens",)
    label_columns = ("tag",)

    def clean(self, fields: Fields, rules: PackingRules) -> dict[str, Any]:
        words = clean_words(fields)
        return {"tokens": words, "tags": clean_tags(fields, words)}

    def columns(self, rules: PackingRules) -> tuple[Column, ...]:
        return (
            Column("tokens", rules.token_dtype, (rules.seq_len,), lengths="length"),
            Column("word_start", "uint8", (rules.seq_len,), lengths="length"),
            Column("length", "uint16"),
            Column("tag", "int32", (rules.seq_len,), lengths="num_words"),
            Column("num_words", "uint16"),
        )

    def pack(self, records: Sequence[Fields], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
        names = tuple(sorted({tag for record in records for tag in record["tags"]}))
        numbers = {name: number for number, name in enumerate(names)}
        document, ordinal, tags = [], [], []
        windows: list[WordWindow] = []
        lost = np.zeros((len(records), 4), dtype=np.int64)
        for number, record in enumerate(records):
            for place, window in enumerate(word_windows(record["tokens"], tokenizer, rules.seq_len)):
                document.append(number)
                ordinal.append(place)
                windows.append(window)
                words = record["tags"][window.first_word : window.first_word + window.num_words]
                tags.append([numbers[tag] for tag in words])
                lost[number, 2:] += (window.cut_tokens > 0, window.cut_tokens)
        tokens, length = padded([window.ids for window in windows], rules.seq_len, tokenizer.pad_id, rules.token_dtype)
        starts, _ = padded([window.word_start for window in windows], rules.seq_len, 0, "uint8")
        tag, num_words = padded(tags, rules.seq_len, 0, "int32")
        columns = {"tokens": tokens, "word_start": starts, "length": length, "tag": tag, "num_words": num_words}
        return PackedRows(
            np.array(document, dtype=np.int64), np.array(ordinal, dtype=np.int64), columns, lost, labels=names
        )


def clean_words(fields: Fields) -> list[str]:
    """The words of a record.  Raises Unusable."""
    words = checked.field(fields, "tokens")
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
        raise Unusable("field 'tokens' is not a list of words")
    if not words:
        raise Empty("field 'tokens' is empty")
    return [checked.checked(word, "tokens") for word in words]


def clean_tags(fields: Fields, words: Sequence[str]) -> list[str]:
    """The tags of a record's words.  Raises Unusable."""
    tags = checked.field(fields, "tags")
    if not isinstance(tags, list | tuple) or not all(isinstance(tag, str) and tag for tag in tags):
        raise Unusable("field 'tags' is not a list of names")
    if len(tags) != len(words):
        raise Unusable(f"{len(tags)} tags for {len(words)} tokens")
    # Tags without any mark of IOB2, such as parts of speech, are taken as they are.
    if any(_looks_like_iob2(tag) or tag == OUTSIDE for tag in tags):
        check_iob2(tags)
    return list(tags)


def check_iob2(tags: Sequence[str]) -> None:
    """Raises Unusable where an entity does not begin with B-, or a tag is neither O, B-x nor I-x."""
    before = OUTSIDE
    for number, tag in enumerate(tags):
        if tag != OUTSIDE and not _looks_like_iob2(tag):
            raise Unusable(f"tag {number} `{tag}` is not of IOB2: O, B-NAME or I-NAME")
        if tag.startswith("I-") and before[2:] != tag[2:]:
            raise Unusable(f"tag {number} `{tag}` follows `{before}`: in IOB2 an entity begins with B-")
        before = tag


def _looks_like_iob2(tag: str) -> bool:
    return tag[:2] in ("B-", "I-") and len(tag) > 2


def word_windows(words: Sequence[str], tokenizer: Tokenizer, seq_len: int) -> list[WordWindow]:
    """The words as model inputs of up to `seq_len` tokens, special tokens included."""
    frame = tokenizer.frame()
    room = seq_len - frame.size
    windows: list[WordWindow] = []
    ids: list[int] = []
    starts: list[int] = []
    first, cut = 0, 0

    def close(next_word: int) -> None:
        nonlocal ids, starts, first, cut
        framed = [*frame.prefix, *ids, *frame.suffix]
        flags = [*(0 for _ in frame.prefix), *starts, *(0 for _ in frame.suffix)]
        windows.append(WordWindow(framed, flags, first, next_word - first, cut))
        ids, starts, first, cut = [], [], next_word, 0

    for number, pieces in enumerate(tokenizer.encode_words(words)):
        # A word of control characters alone has no token; the unknown one keeps its place and its tag.
        pieces = pieces or [tokenizer.special.get("unk_token", tokenizer.pad_id)]
        if ids and len(ids) + len(pieces) > room:
            close(number)
        cut += max(len(pieces) - room, 0)
        ids += pieces[:room]
        starts += [1] + [0] * (min(len(pieces), room) - 1)
    close(len(words))
    return windows
