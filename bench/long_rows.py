"""Memory of a rank by the length of rows, with rows that ranks have for themselves and rows that they share.

    python bench/long_rows.py [--lengths 1024 2048 4096] [--out bench/results/long_rows.md]

Enters: nothing; the text is the docs corpus.  Leaves: a table.  A few minutes on two idle cores.

Two gloo ranks train a small Llama in fp32 for some steps of one micro-batch: of a row each, or of one row
together.  Measured is the peak of a rank's resident memory; planned is what `dist-lm plan` says.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.docs_data import corpus, prepared
from bench.recorded import record
from dist_lm.deepspeed_config import load_run
from dist_lm.plan.machine import machine_of
from dist_lm.plan.plan import Options, make_plan
from dist_lm.plan.probe import measured_gib
from dist_lm.worker import prepare_environment

CORPUS_MB = 4
RANKS = 2
SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "intermediate_size": 768,
}


def recipe(folder: Path, data: Path, tokenizer: Path, length: int, parts: int) -> Path:
    path = folder / f"{length}-{parts}.yaml"
    settings = {
        "task": {"name": "causal_lm", "documents": "joined"},
        "model": {"family": "llama", "size": "mini", "overrides": {**SHAPE, "max_position_embeddings": length}},
        "data": {"train": str(data / "train"), "tokenizer": str(tokenizer), "seq_len": length, "era": 16, "lanes": 1},
        "batch": {"global": RANKS // parts, "micro": 1},
        "optim": {"lr": 1e-4},
        "run": {"dir": str(folder / "run"), "steps": 4},
        "sequence_parallel_size": parts,
    }
    path.write_text(json.dumps(settings))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prepare_environment()
    head = ("tokens a row", "ranks a row", "activations planned, MiB", "peak planned, MiB", "peak measured, MiB")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    figures = []
    with tempfile.TemporaryDirectory(prefix="dist_lm-long-rows-") as name:
        folder = Path(name)
        data, tokenizer = prepared(folder, corpus(folder, CORPUS_MB), tokenizer="bpe")
        for length in options.lengths:
            for parts in (1, 2):
                path = recipe(folder, data, tokenizer, length, parts)
                config = load_run(path).config
                plan = make_plan(config, machine_of("cpu", RANKS, config.precision), Options())
                stage = plan.stage(plan.configured)
                gib = (stage.activations_gib, stage.total_gib, measured_gib(path, [], ranks=RANKS))
                figures.append(dict(zip(head, [length, parts, *(x * 1024 for x in gib)], strict=True)))
                lines.append("| " + " | ".join(f"{x:.0f}" for x in figures[-1].values()) + " |")
                print(lines[-1], flush=True)
    record("Memory of a rank by the length of rows", "\n".join(lines), {"rows": figures}, options.out)


if __name__ == "__main__":
    main()
