"""Real text for benchmarks: the documentation of this machine's Python packages, prepared.

Enters: an empty folder.  Leaves: TOKENIZER and data sets in it, made by `dist-lm` commands.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_TOKENIZER_MB = 4
_VOCABULARY = 6000


def dist_lm(*words: str | Path) -> None:
    """One command; its output is shown only where it fails."""
    command = [sys.executable, "-m", "dist_lm", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def corpus(folder: Path, megabytes: int) -> Path:
    path = folder / "corpus.jsonl"
    if not path.exists():
        dist_lm("data", "corpus", "docs", "--out", path, "--limit-mb", str(megabytes))
    return path


def prepared(folder: Path, text: Path, *, tokenizer: str = "wordpiece", kind: str = "tokens") -> tuple[Path, Path]:
    """Data set and tokenizer; what exists is taken as it is.  `tokenizer`: wordpiece, bpe or t5."""
    vocabulary, data = folder / f"tokenizer-{tokenizer}", folder / f"{kind}-{tokenizer}"
    if not vocabulary.exists():
        options = ("--vocab-size", str(_VOCABULARY), "--max-mb", str(_TOKENIZER_MB))
        dist_lm("tokenizer", "train", text, "--kind", tokenizer, *options, "--out", vocabulary)
    if not data.exists():
        dist_lm("data", "prepare", text, "--kind", kind, "--tokenizer", vocabulary, "--out", data)
    return data, vocabulary
