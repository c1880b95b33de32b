"""A look into a data set: decoded samples, lengths, counts.

Enters: a data set of any kind and its tokenizer.  Leaves: text for people, and figures about the tokens.
Promises: reads every block through the same reader as training.  A sample is a row; of a stream of
tokens it is a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.kinds.registry import kind_named
from dist_lm.data.location import redact
from dist_lm.data.manifest import Manifest
from dist_lm.data.shards import Block, ShardReader
from dist_lm.data.tokenizer import compare_tokenizer, load_tokenizer
from dist_lm.data.views import TOKENS_COLUMN, TOKENS_KIND

_BARS = 8
_BAR_WIDTH = 40
_DOCUMENT_COLUMN = "document"


def inspect_dataset(location: str | Path, tokenizer_path: Path, *, show: int = 3) -> str:
    """Counts, a histogram of the samples' lengths, labels, and `show` decoded samples."""
    manifest = Manifest.load(location)
    label_columns = _label_columns(manifest)
    labels = np.zeros(len(manifest.labels), dtype=np.int64)
    lengths: list[NDArray[np.int64]] = []
    documents: list[NDArray[Any]] = []
    for block in _blocks(location, manifest):
        lengths.append(_lengths(block, manifest))
        if _DOCUMENT_COLUMN in block:
            documents.append(np.unique(block[_DOCUMENT_COLUMN]))
        for name in label_columns:
            labels += np.bincount(_filled(block, manifest, name), minlength=len(labels))
    sample_lengths = np.concatenate(lengths)
    if manifest.kind == TOKENS_KIND:
        sample_lengths = np.array([len(ids) for parts, _ in _samples(location, manifest) for ids in parts])
        counted = f"{len(sample_lengths)} documents"
    else:
        counted = f"{manifest.num_rows} rows of up to {manifest.seq_len} tokens"
        if documents:
            counted += f" of {len(np.unique(np.concatenate(documents)))} documents"
    lines = [
        f"{redact(location)}: kind {manifest.kind}, {counted}, {manifest.num_tokens} tokens, "
        f"{len(manifest.shards)} shards"
    ]
    for text, label in islice(decoded_rows(location, tokenizer_path), show):
        lines.append(f"sample {text}" + (f"  [{label}]" if label else ""))
    lines += _histogram(sample_lengths)
    lines += [f"label  {name}: {count}" for name, count in zip(manifest.labels, labels, strict=True)]
    return "\n".join(lines)


def decoded_rows(location: str | Path, tokenizer_path: Path) -> Iterator[tuple[str, str]]:
    """Text and label of each sample, in the order of the shards; the label is empty where there is none."""
    manifest = Manifest.load(location)
    tokenizer = load_tokenizer(tokenizer_path)
    compare_tokenizer(manifest, tokenizer, folder=location)
    for parts, label in _samples(location, manifest):
        yield " || ".join(tokenizer.decode(ids) for ids in parts), label


def unigram_entropy(location: str | Path) -> float:
    """Entropy of the token distribution, in nats: the loss of a model that knows only frequencies."""
    manifest = Manifest.load(location)
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for block in _blocks(location, manifest):
        for name in _token_columns(manifest):
            counts += np.bincount(_filled(block, manifest, name), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _blocks(location: str | Path, manifest: Manifest) -> Iterator[Block]:
    reader = ShardReader(location, manifest)
    for shard, entry in enumerate(manifest.shards):
        yield from reader.blocks(shard, 0, entry.blocks)


def _samples(location: str | Path, manifest: Manifest) -> Iterator[tuple[list[NDArray[Any]], str]]:
    """The token numbers of each sample, a part for each column that has any, and its label."""
    if manifest.kind == TOKENS_KIND:
        for document in _documents(location, manifest):
            yield [document], ""
        return
    names, label_columns = _token_columns(manifest), _label_columns(manifest)
    for block in _blocks(location, manifest):
        for row in range(len(next(iter(block.values())))):
            parts = [_row(block, manifest, name, row) for name in names]
            numbers = [number for name in label_columns for number in _row(block, manifest, name, row).tolist()]
            yield [part for part in parts if len(part)], " ".join(manifest.labels[number] for number in numbers)


def _documents(location: str | Path, manifest: Manifest) -> Iterator[NDArray[Any]]:
    """The documents of a stream of tokens, without their separators."""
    begun: list[NDArray[Any]] = []
    for block in _blocks(location, manifest):
        tokens = block[TOKENS_COLUMN]
        start = 0
        for end in np.flatnonzero(tokens == manifest.facts["separator_id"]):
            yield np.concatenate([*begun, tokens[start:end]])
            begun, start = [], int(end) + 1
        begun.append(tokens[start:])
    rest = np.concatenate(begun)
    if rest.size:
        yield rest


def _token_columns(manifest: Manifest) -> list[str]:
    stored = {column.name for column in manifest.columns}
    return [name for name in kind_named(manifest.kind).token_columns if name in stored]


def _label_columns(manifest: Manifest) -> list[str]:
    stored = {column.name for column in manifest.columns}
    return [name for name in kind_named(manifest.kind).label_columns if name in stored]


def _row(block: Block, manifest: Manifest, name: str, row: int) -> NDArray[Any]:
    """The filled places of one row of a column."""
    lengths = manifest.column(name).lengths
    values = np.atleast_1d(block[name][row])
    return values[: int(block[lengths][row])] if lengths else values


def _filled(block: Block, manifest: Manifest, name: str) -> NDArray[Any]:
    """The filled places of all rows of a column, one after the other."""
    lengths = manifest.column(name).lengths
    if not lengths:
        return block[name].reshape(-1)
    array: NDArray[Any] = block[name]
    return array[np.arange(array.shape[1]) < block[lengths][:, None]]


def _lengths(block: Block, manifest: Manifest) -> NDArray[np.int64]:
    """[rows]; tokens of each row."""
    total = np.zeros(len(next(iter(block.values()))), dtype=np.int64)
    for name in _token_columns(manifest):
        lengths = manifest.column(name).lengths
        total += block[lengths].astype(np.int64) if lengths else 1
    return total


def _histogram(lengths: NDArray[np.int64]) -> list[str]:
    counts, edges = np.histogram(lengths, bins=_BARS)
    most = max(int(counts.max()), 1)
    return [
        f"{int(low):5}-{int(high):<5} {'#' * round(_BAR_WIDTH * int(count) / most)} {count}"
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
