"""What preparation costs: tokens a second, and the largest process, for two sizes of input.

    python bench/prepare.py [--kind pairs] [--mb 16 64] [--workers 1] [--bucket-mb 8]

The text is the documentation of the installed packages, repeated with a number before each text so
that nothing is a duplicate.  Prints one line of JSON for each size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dist_lm.data.corpus_docs import write_docs_corpus
from dist_lm.data.manifest import Manifest
from dist_lm.data.tokenizer import train_tokenizer

_CORPUS_MB = 8.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", default="pairs")
    parser.add_argument("--mb", type=int, nargs="+", default=[16, 64], help="increasing: peaks are of all so far")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--bucket-mb", type=int, default=8)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_docs_corpus(folder / "corpus.jsonl", workers=options.workers, limit_mb=_CORPUS_MB)
        texts = [json.loads(line)["text"] for line in (folder / "corpus.jsonl").open()]
        train_tokenizer(texts, vocab_size=8000, out=folder / "tokenizer", max_bytes=4_000_000)
        for megabytes in options.mb:
            print(json.dumps(_measure(folder, texts, megabytes, options)), flush=True)


def _measure(folder: Path, texts: list[str], megabytes: int, options: argparse.Namespace) -> dict[str, object]:
    source, out = folder / f"{megabytes}.jsonl", folder / f"data-{megabytes}"
    _write(source, texts, megabytes * 1_000_000)
    words = ["data", "prepare", source, "--out", out, "--tokenizer", folder / "tokenizer", "--kind", options.kind]
    words += ["--workers", options.workers, "--bucket-mb", options.bucket_mb]
    began_at = time.perf_counter()
    subprocess.run([sys.executable, "-m", "dist_lm", *map(str, words)], check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began_at
    tokens = sum(Manifest.load(out / split).num_tokens for split in ("train", "heldout"))
    return {
        "kind": options.kind,
        "input_mb": megabytes,
        "workers": options.workers,
        "bucket_mb": options.bucket_mb,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds),
        "largest_process_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1000),
    }


def _write(path: Path, texts: list[str], num_bytes: int) -> None:
    copy = 0
    with path.open("w") as file:
        while file.tell() < num_bytes:
            for text in texts:
                file.write(json.dumps({"text": f"{copy} {text}"}) + "\n")
            copy += 1


if __name__ == "__main__":
    main()
