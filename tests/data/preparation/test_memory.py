"""The memory of a task does not grow with the input."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from dist_lm.data.prepare import prepare
from dist_lm.data.shards import Manifest
from dist_lm.data.tokenizer import Tokenizer
from tests.data.preparation.preparing import TEXTS, options

pytestmark = pytest.mark.fast


def peak_bytes(folder: Path, tokenizer: Tokenizer, copies: int) -> int:
    """Most that Python, NumPy and Arrow held while so many copies of the texts, all different, were prepared."""
    source = folder / f"{copies}.jsonl"
    with source.open("w") as file:
        for copy in range(copies):
            for text in TEXTS:
                file.write(json.dumps({"text": f"{copy} {text[:500]}"}) + "\n")
    sizes = {"split_bytes": 100_000, "part_bytes": 50_000, "bucket_bytes": 100_000, "shard_rows": 500}
    made = options(source, tokenizer, folder / str(copies), **sizes)
    usual = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counting)
    tracemalloc.start()
    try:
        prepare(made)
        _, traced = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)
    assert Manifest.load(made.out / "train").num_rows > 200 * copies
    return traced + counting.max_memory()


def test_four_times_the_text_takes_no_more_memory(tokenizer: Tokenizer, tmp_path: Path) -> None:
    # Imports at first use would count as memory of the first one.
    prepare(options(write_one(tmp_path), tokenizer, tmp_path / "first", heldout_fraction=0.0))
    once = peak_bytes(tmp_path, tokenizer, 1)
    four_times = peak_bytes(tmp_path, tokenizer, 4)
    assert four_times < 1.25 * once


def write_one(folder: Path) -> Path:
    path = folder / "one.jsonl"
    path.write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    return path
