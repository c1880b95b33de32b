"""Preparation beside `datasets.map` with the same tokenizer, on the documentation corpus.

Enters: nothing.  Leaves: tokens a second of processor time, for both.
Promises: both read the same .jsonl and write tokens to disk; each runs in a process of its own on one
thread, and its whole processor time counts, imports and writing included.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT_MB = 12
ENVIRONMENT = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def compare_preparation() -> tuple[float, float]:
    """Tokens a second and core: `dist-lm data prepare`, and `datasets.map`."""
    from dist_lm.data.corpus_docs import write_docs_corpus
    from dist_lm.data.tokenizer import train_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus.jsonl"
        write_docs_corpus(corpus, workers=1, limit_mb=LIMIT_MB)
        with corpus.open() as lines:
            texts = [json.loads(line)["text"] for line in lines]
        train_tokenizer(texts, vocab_size=8000, out=folder / "tokenizer", max_bytes=4_000_000)
        return _rate("ours", folder), _rate("theirs", folder)


def _rate(side: str, folder: Path) -> float:
    command = [sys.executable, __file__, side, str(folder)]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, check=True, capture_output=True, text=True)
    tokens, seconds = map(float, done.stdout.split()[-2:])
    return tokens / seconds


def _ours(folder: Path) -> int:
    from dist_lm.data.prepare import PrepareOptions, prepare

    options = PrepareOptions(
        [str(folder / "corpus.jsonl")],
        folder / "ours",
        folder / "tokenizer",
        kind="tokens",
        heldout_fraction=0.0,
        min_tokens=1,
        workers=1,
    )
    return prepare(options).splits["train"]["tokens"]


def _theirs(folder: Path) -> int:
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder / "tokenizer"))
    datasets.disable_progress_bars()
    texts = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(folder / "cache")
    )
    tokens = texts.map(
        lambda batch: {"input_ids": tokenizer(batch["text"], add_special_tokens=False)["input_ids"]},
        batched=True,
        remove_columns=texts.column_names,
    )
    tokens.save_to_disk(str(folder / "theirs"))
    return sum(map(len, tokens.with_format("arrow")["input_ids"].to_pylist()))


def main() -> None:
    side, folder = sys.argv[1], Path(sys.argv[2])
    tokens = _ours(folder) if side == "ours" else _theirs(folder)
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(tokens, own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime)


if __name__ == "__main__":
    main()
