"""Rows of kind `tokens` made of the Python reference, as a stream would hand them to a task."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from dist_lm.data.manifest import Column, Manifest
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer, train_tokenizer
from dist_lm.data.views import View, view_of

TEXTS = [topics[name] for name in sorted(topics)][:40]
SIZES = {"wordpiece": 600, "bpe": 600, "t5": 700}


def train_kind(folder: Path, kind: str) -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=SIZES[kind], kind=kind, out=folder / kind)


def token_view(tokenizer: Tokenizer, seq_len: int) -> View:
    """What a task asks of a stream of tokens."""
    manifest = Manifest(
        kind="tokens",
        columns=(Column("tokens", "uint16"),),
        block_rows=65536,
        seq_len=seq_len,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        num_rows=1,
        num_tokens=1,
        shards=(),
        facts={"separator_id": tokenizer.separator_id},
    )
    return view_of(manifest, seq_len)


def token_rows(tokenizer: Tokenizer, seq_len: int, *, count: int = 8, document_tokens: int = 37) -> Rows:
    """The first rows of a stream of short documents, so that every row holds some."""
    stream: list[int] = []
    for ids in tokenizer.encode_batch(TEXTS):
        for begin in range(0, len(ids), document_tokens):
            stream += [*ids[begin : begin + document_tokens], tokenizer.separator_id]
    tokens = np.array(stream[: count * seq_len], dtype=np.uint16).reshape(count, seq_len)
    return Rows(
        {"tokens": tokens},
        np.arange(count, dtype=np.uint64),
        np.zeros(count, dtype=np.int64),
        np.ones(count, dtype=np.bool_),
    )
