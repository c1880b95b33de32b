"""A look into a data set: decoded rows, lengths, counts.

Enters: a data set folder and its tokenizer.  Leaves: text for people, and figures about the tokens.
Promises: reads every block through the same reader as training.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.location import redact
from dist_lm.data.manifest import Manifest
from dist_lm.data.shards import ShardReader
from dist_lm.data.tokenizer import compare_tokenizer, load_tokenizer

_BARS = 8
_BAR_WIDTH = 40
_TOKEN_COLUMNS = {"first": "first_length", "second": "second_length", "tokens": "length"}


def inspect_dataset(location: str | Path, tokenizer_path: Path, *, show: int = 3) -> str:
    """Counts, a histogram of row lengths, labels, and `show` decoded rows."""
    manifest = Manifest.load(location)
    lines = [
        f"{redact(location)}: kind {manifest.kind}, {manifest.num_rows} rows, {manifest.num_tokens} tokens, "
        f"{len(manifest.shards)} shards, rows of up to {manifest.seq_len} tokens"
    ]
    lengths: list[NDArray[np.int64]] = []
    labels = np.zeros(len(manifest.labels), dtype=np.int64)
    for block in _blocks(location, manifest):
        lengths.append(sum(block[name].astype(np.int64) for _, name in _pairs(block)))  # type: ignore[arg-type]
        if "label" in block:
            labels += np.bincount(block["label"], minlength=len(labels))
    for text, label in islice(decoded_rows(location, tokenizer_path), show):
        lines.append(f"row    {text}" + (f"  [{label}]" if label else ""))
    lines += _histogram(np.concatenate(lengths))
    lines += [f"label  {name}: {count}" for name, count in zip(manifest.labels, labels, strict=True)]
    return "\n".join(lines)


def decoded_rows(location: str | Path, tokenizer_path: Path) -> Iterator[tuple[str, str]]:
    """Text and label of each row, in the order of the shards; the label is empty where there is none."""
    manifest = Manifest.load(location)
    tokenizer = load_tokenizer(tokenizer_path)
    compare_tokenizer(manifest, tokenizer, folder=location)
    for block in _blocks(location, manifest):
        for row in range(len(block[_pairs(block)[0][1]])):
            parts = [tokenizer.decode(block[column][row][: block[name][row]]) for column, name in _pairs(block)]
            yield " || ".join(parts), manifest.labels[block["label"][row]] if "label" in block else ""


def unigram_entropy(location: str | Path) -> float:
    """Entropy of the token distribution, in nats: the loss of a model that knows only frequencies."""
    manifest = Manifest.load(location)
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for block in _blocks(location, manifest):
        for column, name in _pairs(block):
            real = np.arange(block[column].shape[1])[None, :] < block[name][:, None]
            counts += np.bincount(block[column][real], minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _blocks(location: str | Path, manifest: Manifest) -> Iterator[dict[str, NDArray[Any]]]:
    reader = ShardReader(location, manifest)
    for shard, entry in enumerate(manifest.shards):
        yield from reader.blocks(shard, 0, entry.blocks)


def _pairs(block: dict[str, NDArray[Any]]) -> list[tuple[str, str]]:
    """Columns of tokens with the columns of their lengths."""
    return [(column, length) for column, length in _TOKEN_COLUMNS.items() if column in block]


def _histogram(lengths: NDArray[np.int64]) -> list[str]:
    counts, edges = np.histogram(lengths, bins=_BARS)
    most = max(int(counts.max()), 1)
    return [
        f"{int(low):5}-{int(high):<5} {'#' * round(_BAR_WIDTH * int(count) / most)} {count}"
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
