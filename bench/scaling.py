"""How time and memory grow with the work: ranks, model, length of rows, number of shards.

    python bench/scaling.py [--steps 5] [--only ranks model length shards] [--out bench/results/scaling.md]

Enters: nothing; the text is the docs corpus.  Leaves: a table, and exponents: y grows as x to that power,
by least squares over the logarithms.  About five minutes on two idle cores.

ranks   1, 2, 4 gloo ranks, the same rows a rank; `step_s_a_core` is a step's time divided by the ranks that
        take turns on a core: it should stay the same.
model   1, 4, 16 times the parameters beside the embeddings, on one rank.
length  rows of 64 to 1024 tokens, one to sixteen times, with the same number of rows.
shards  10 to 10 000 shards (simulated manifests, bench/data.py): time to open, of the first and later
        batches' places, memory held.

`own_mib` is the peak of a rank's memory without the libraries, which it holds before it has a model.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.docs_data import corpus, prepared
from bench.recorded import record
from dist_lm.metrics import read_metrics
from dist_lm.plan.baseline import EXACT_MALLOC, process_bytes
from dist_lm.worker import prepare_environment

CORPUS_MB = 4
Row = dict[str, float]
WARM_UP = 2


def exponent(rows: list[Row], x: str, y: str) -> float:
    """Slope of log y over log x."""
    xs, ys = [math.log(row[x]) for row in rows], [math.log(row[y]) for row in rows]
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    products = sum((a - mean_x) * (b - mean_y) for a, b in zip(xs, ys, strict=True))
    return products / sum((a - mean_x) ** 2 for a in xs)


class Trainings:
    """Runs of a few steps on prepared text."""

    def __init__(self, folder: Path, steps: int) -> None:
        self.folder, self.steps = folder, steps
        self.data, self.tokenizer = prepared(folder, corpus(folder, CORPUS_MB))
        self.libraries_mib = process_bytes() / 2**20

    def __call__(self, *, ranks: int, rows: int, length: int, shape: dict[str, int]) -> Row:
        """Step time, and the peak of a rank's memory."""
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            recipe = Path(name) / "recipe.yaml"
            recipe.write_text(
                json.dumps(
                    {
                        "task": {"name": "mlm", "pair": "none"},
                        "model": {"family": "bert", "size": "tiny", "overrides": shape},
                        "data": {
                            "train": str(self.data / "train"),
                            "tokenizer": str(self.tokenizer),
                            "seq_len": length - 2,
                        },
                        "batch": {"global": rows * ranks, "micro": rows},
                        "optim": {"lr": 1e-4},
                        "run": {"dir": f"{name}/run", "steps": self.steps + WARM_UP, "log_every": 1},
                    }
                )
            )
            command = [sys.executable, "-m", "dist_lm", "train", "-c", str(recipe), "--cpu", str(ranks)]
            environment = {**os.environ, **EXACT_MALLOC, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)
            records = read_metrics(Path(name) / "run" / "metrics.jsonl", "train")
        steady = sorted(each["step_seconds"] for each in records[WARM_UP:])
        memory_mib = max(each["memory_gib"] for each in records) * 1024
        return {
            "step_s": steady[len(steady) // 2],
            "memory_mib": memory_mib,
            "own_mib": memory_mib - self.libraries_mib,
        }


def _shape(hidden: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, hidden // 64),
        "intermediate_size": 4 * hidden,
    }


def ranks(train: Trainings) -> Iterator[Row]:
    for number in (1, 2, 4):
        found = train(ranks=number, rows=8, length=128, shape=_shape(256, 2))
        # Ranks take turns on the cores that there are.
        crowding = max(1.0, number / (os.cpu_count() or 1))
        yield {"ranks": number, **found, "step_s_a_core": found["step_s"] / crowding}


def model(train: Trainings) -> Iterator[Row]:
    for times, (hidden, layers) in {1: (256, 2), 4: (512, 2), 16: (1024, 2)}.items():
        yield {"times": times, **train(ranks=1, rows=8, length=128, shape=_shape(hidden, layers))}


def length(train: Trainings) -> Iterator[Row]:
    shape = _shape(256, 2) | {"max_position_embeddings": 1024}
    for tokens in (64, 128, 256, 512, 1024):
        yield {"tokens": tokens, **train(ranks=1, rows=4, length=tokens, shape=shape)}


def shards(_: Trainings) -> Iterator[Row]:
    # bench/data.py imports its neighbours by their bare names.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from data import growth

    yield from growth()


PARTS: dict[str, tuple[Callable[[Trainings], Iterator[Row]], str, tuple[str, ...]]] = {
    "ranks": (ranks, "ranks", ("step_s", "step_s_a_core", "memory_mib", "own_mib")),
    "model": (model, "times", ("step_s", "memory_mib", "own_mib")),
    "length": (length, "tokens", ("step_s", "memory_mib", "own_mib")),
    "shards": (shards, "shards", ("open_ms", "first_ms", "batch_ms", "held_mb")),
}


def table(rows: list[Row], x: str, measured: tuple[str, ...]) -> str:
    lines = [f"| {x} | {' | '.join(measured)} |", "|---" * (len(measured) + 1) + "|"]
    for row in rows:
        lines.append(f"| {row[x]:g} | " + " | ".join(f"{row[name]:.4g}" for name in measured) + " |")
    exponents = " | ".join(f"{exponent(rows, x, name):.2f}" for name in measured)
    return "\n".join([*lines, f"| exponent | {exponents} |"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prepare_environment()
    began = time.monotonic()
    figures: dict[str, Any] = {}
    texts = []
    with tempfile.TemporaryDirectory(prefix="dist_lm-scaling-") as name:
        train = Trainings(Path(name), options.steps)
        for part in options.only:
            measure, x, measured = PARTS[part]
            rows = list(measure(train))
            figures[part] = {"rows": rows, "exponents": {y: exponent(rows, x, y) for y in measured}}
            texts.append(f"## {part}\n\n{table(rows, x, measured)}")
            print(texts[-1], flush=True)
    figures["seconds"] = round(time.monotonic() - began)
    record("How time and memory grow with the work", "\n\n".join(texts), figures, options.out)


if __name__ == "__main__":
    main()
