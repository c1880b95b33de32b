"""Kind `tokens`: documents one after the other as one endless stream, for causal LM and span corruption.

Enters: texts.  Leaves: tokens, a separator behind each document; a row of the data set is a token.
Promises: no token is cut off, and no document is parted by the shuffle.  How long a training row is
is chosen at training time: row k of a shard is its tokens [kL, kL + L).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Fields, Kind, PackedRows, PackingRules
from dist_lm.data.manifest import Column
from dist_lm.data.tokenizer import Tokenizer


class Tokens(Kind):
    name = "tokens"
    fields = {"text": "a document"}
    token_columns = ("tokens",)
    whole_documents = True
    block_rows = 131072
    shard_rows = 1 << 25

    def clean(self, fields: Fields, rules: PackingRules) -> dict[str, Any]:
        return {"text": checked.text(fields, "text")}

    def content(self, cleaned: Fields) -> str:
        return str(cleaned["text"])

    def columns(self, rules: PackingRules) -> tuple[Column, ...]:
        return (Column("tokens", rules.token_dtype),)

    def pack(self, records: Sequence[Fields], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
        encoded = tokenizer.encode_batch([record["text"] for record in records])
        lost = np.zeros((len(records), 4), dtype=np.int64)
        separator = tokenizer.separator_id
        documents: list[list[int]] = []
        for document, ids in enumerate(encoded):
            if len(ids) < rules.min_tokens:
                lost[document, :2] = (1, len(ids))
                ids = []
            documents.append([*ids, separator] if ids else [])
        lengths = np.array([len(ids) for ids in documents], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        tokens = np.fromiter(chain.from_iterable(documents), dtype=rules.token_dtype, count=int(lengths.sum()))
        document_of = np.repeat(np.arange(len(documents)), lengths)
        return PackedRows(document_of, np.arange(len(tokens)) - starts[document_of], {"tokens": tokens}, lost)

    def facts(self, tokenizer: Tokenizer, rules: PackingRules) -> dict[str, Any]:
        return {"separator_id": tokenizer.separator_id}
