"""What Python, NumPy and Arrow hold at most while texts are prepared, in a process of its own.

python -m tests.data.preparation.peak_memory FOLDER TOKENIZER COPIES...

With a minus before COPIES: of the texts once, and of one of them repeated so often.
"""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa

from dist_lm.data.prepare import prepare
from dist_lm.data.shards import Manifest
from dist_lm.data.tokenizer import load_tokenizer
from tests.data.preparation.preparing import TEXTS, options


def peak_bytes(folder: Path, tokenizer: Path, copies: int, repeats: int) -> int:
    """Of a preparation of so many copies of the texts, each made different, and one text repeated so often."""
    source = folder / f"{copies}-{repeats}.jsonl"
    with source.open("w") as file:
        for copy in range(copies):
            for text in TEXTS:
                file.write(json.dumps({"text": f"{copy} {text[:300]}"}) + "\n")
        file.write((json.dumps({"text": TEXTS[0][:300]}) + "\n") * repeats)
    sizes = {"split_bytes": 100_000, "part_bytes": 50_000, "bucket_bytes": 100_000, "shard_rows": 500}
    made = options(source, load_tokenizer(tokenizer), source.with_suffix(""), **sizes)
    usual = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counting)
    tracemalloc.start()
    prepare(made)
    _, traced = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    pa.set_memory_pool(usual)
    assert Manifest.load(made.out / "train").num_rows > 200 * copies
    return traced + counting.max_memory()


if __name__ == "__main__":
    # The first one imports at first use.
    folder, tokenizer, *counts = sys.argv[1:]
    print(*[peak_bytes(Path(folder), Path(tokenizer), max(n, 1), max(-n, 0)) for n in map(int, counts)])
