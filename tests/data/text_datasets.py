"""Small data sets of real text for tests: the Python reference, one token a byte."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.shards import Column, Manifest, write_shard

VOCAB_SIZE = 256
TOKENIZER_SHA256 = hashlib.sha256(b"one token a byte").hexdigest()


@dataclass(frozen=True)
class TextDataset:
    """A data set on disk, and what it should hold: for each column all rows, in the order of storage."""

    folder: Path
    manifest: Manifest
    columns: dict[str, NDArray[Any]]

    def tar(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].name

    def index(self, shard: int) -> Path:
        return self.folder / self.manifest.shards[shard].index_name

    def offsets(self, shard: int) -> list[int]:
        return [int(offset) for offset in np.fromfile(self.index(shard), dtype="<u8")]


def pair_columns(seq_len: int) -> tuple[Column, ...]:
    room_a = (seq_len - 3) // 2
    return (
        Column("first", "uint16", (room_a,), lengths="first_length"),
        Column("second", "uint16", (seq_len - 3 - room_a,), lengths="second_length"),
        Column("first_length", "uint16"),
        Column("second_length", "uint16"),
        Column("document", "uint32"),
    )


def pair_rows(num_rows: int, seq_len: int) -> dict[str, NDArray[Any]]:
    """Pairs of neighbouring pieces of the Python reference."""
    first, second = (column.shape[0] for column in pair_columns(seq_len)[:2])
    rows: dict[str, list[Any]] = {column.name: [] for column in pair_columns(seq_len)}
    for document, name in enumerate(sorted(topics.topics)):
        content = np.frombuffer(topics.topics[name].encode(), dtype=np.uint8).astype(np.uint16)
        for at in range(0, len(content), first + second):
            piece = content[at : at + first + second]
            if len(piece) < 2 or len(rows["first"]) == num_rows:
                continue
            cut = min(first, len(piece) // 2 + 1)
            rows["first"].append(np.pad(piece[:cut], (0, first - cut)))
            rows["second"].append(np.pad(piece[cut:][:second], (0, second - len(piece[cut:][:second]))))
            rows["first_length"].append(cut)
            rows["second_length"].append(len(piece[cut:][:second]))
            rows["document"].append(document)
    assert len(rows["first"]) == num_rows, "the Python reference is shorter than that"
    return {column.name: np.array(rows[column.name], dtype=column.dtype) for column in pair_columns(seq_len)}


def write_pairs(folder: Path, shard_rows: Sequence[int], *, block_rows: int = 16, seq_len: int = 35) -> TextDataset:
    """A data set of kind "pairs" with shards of these sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = pair_columns(seq_len)
    columns = pair_rows(sum(shard_rows), seq_len)
    entries, at = [], 0
    for shard, rows in enumerate(shard_rows):
        part = {name: array[at : at + rows] for name, array in columns.items()}
        entries.append(write_shard(folder, shard, part, spec=spec, block_rows=block_rows))
        at += rows
    manifest = Manifest(
        kind="pairs",
        columns=spec,
        block_rows=block_rows,
        seq_len=seq_len,
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=TOKENIZER_SHA256,
        num_rows=sum(shard_rows),
        num_tokens=int(columns["first_length"].sum() + columns["second_length"].sum()),
        shards=tuple(entries),
        preparation={"inputs": ["pydoc_data.topics"]},
    )
    manifest.save(folder)
    return TextDataset(folder, manifest, columns)


def write_tokens(folder: Path, shard_tokens: Sequence[int], *, block_tokens: int = 64) -> TextDataset:
    """A data set of kind "tokens": the Python reference, a zero after each document."""
    folder.mkdir(parents=True, exist_ok=True)
    spec = (Column("tokens", "uint16"),)
    documents = [topics.topics[name].encode() + b"\0" for name in sorted(topics.topics)]
    text = np.frombuffer(b"".join(documents), dtype=np.uint8).astype(np.uint16)[: sum(shard_tokens)]
    assert len(text) == sum(shard_tokens), "the Python reference is shorter than that"
    entries, at = [], 0
    for shard, tokens in enumerate(shard_tokens):
        part = {"tokens": text[at : at + tokens]}
        entries.append(write_shard(folder, shard, part, spec=spec, block_rows=block_tokens))
        at += tokens
    manifest = Manifest(
        kind="tokens",
        columns=spec,
        block_rows=block_tokens,
        seq_len=1,
        vocab_size=VOCAB_SIZE,
        tokenizer_sha256=TOKENIZER_SHA256,
        num_rows=len(text),
        num_tokens=len(text),
        shards=tuple(entries),
        facts={"separator_id": 0},
    )
    manifest.save(folder)
    return TextDataset(folder, manifest, {"tokens": text})


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)
