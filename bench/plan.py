"""`dist-lm plan --probe` for many runs: planned beside measured memory and step time of two CPU ranks.

    python bench/plan.py [--models bert gpt2 t5] [--batches 16x8 64x16] [--stages 0 1 2 3] [--memory-only]
                         [--work FOLDER] [--out bench/results/plan.md]

Enters: nothing; the text is the docs corpus.  Leaves: a table.  A batch is rows in all x rows of a
micro-batch at most: 16x8 is one micro-step, 64x16 two.  Memory is the peak of a rank's resident memory in
four steps, freed memory returned at once (dist_lm/plan/probe.py); `held` is the same peak as glibc comes.
The rate for step times is measured once a model, on micro-batches half as large as its smallest.
About ten minutes on two idle cores, half of that with --memory-only.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.docs_data import corpus, prepared
from bench.recorded import record
from dist_lm.worker import prepare_environment

RANKS, STEPS, CORPUS_MB = 2, 6, 4
# Family: task, tokenizer, kind of data.
MODELS = {
    "bert": ({"name": "mlm", "pair": "nsp"}, "wordpiece", "pairs"),
    "gpt2": ({"name": "causal_lm", "documents": "isolated"}, "bpe", "tokens"),
    "t5": ({"name": "span_corruption"}, "t5", "tokens"),
}


def recipe(folder: Path, family: str) -> Path:
    task, tokenizer, kind = MODELS[family]
    data, vocabulary = prepared(folder, corpus(folder, CORPUS_MB), tokenizer=tokenizer, kind=kind)
    length = {"seq_len": 128} if kind == "tokens" else {}
    path = folder / f"{family}.yaml"
    path.write_text(
        json.dumps(
            {
                "task": task,
                "model": {"family": family, "size": "mini"},
                "data": {"train": str(data / "train"), "tokenizer": str(vocabulary), **length},
                "batch": {"global": 16, "micro": 8},
                "optim": {"lr": 1e-3},
                "run": {"dir": str(folder / "run"), "steps": 1000},
            }
        )
    )
    return path


def rows(folder: Path, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    from dist_lm.deepspeed_config import load_run
    from dist_lm.plan.machine import machine_of
    from dist_lm.plan.plan import Options, make_plan
    from dist_lm.plan.probe import calibrated, measure, measured_gib

    bare = machine_of("cpu", RANKS, "fp32")
    for family in options.models:
        path, machine = recipe(folder, family), bare
        for number, batch in enumerate(options.batches):
            in_all, most = batch.split("x")
            sizes = [f"batch.global={in_all}", f"batch.micro={most}"]
            if number == 0 and not options.memory_only:
                first = make_plan(load_run(path, sizes).config, bare, Options())
                machine = calibrated(path, sizes, first, bare, steps=STEPS)
            planned = make_plan(load_run(path, sizes).config, machine, Options(mfu=1.0))
            for stage in options.stages:
                said, overrides = planned.stage(stage), [*sizes, f"zero={stage}"]
                row: dict[str, Any] = {"run": f"{family} mini {batch}, zero {stage}", "planned_gib": said.total_gib}
                if options.memory_only:
                    row["measured_gib"] = measured_gib(path, overrides, ranks=RANKS)
                else:
                    found = measure(path, overrides, ranks=RANKS, steps=STEPS)
                    row |= {"measured_gib": found.memory_gib, "held_gib": found.held_gib}
                    row |= {"planned_s": said.step_s, "measured_s": found.step_s}
                    row["time_ratio"] = said.step_s / found.step_s
                row["memory_ratio"] = said.total_gib / row["measured_gib"]
                print(json.dumps(row), file=sys.stderr, flush=True)
                yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", default=["16x8", "64x16"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    parser.add_argument("--memory-only", action="store_true")
    parser.add_argument("--work", type=Path, help="folder where prepared data are kept, and found the next time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    prepare_environment()
    with tempfile.TemporaryDirectory(prefix="dist_lm-plan-") as name:
        work = options.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        found = list(rows(work, options))
    columns = [name for name in ("planned_gib", "measured_gib", "memory_ratio", "held_gib") if name in found[0]]
    columns += [name for name in ("planned_s", "measured_s", "time_ratio") if name in found[0]]
    lines = [f"| run | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {row['run']} | " + " | ".join(f"{row[name]:.3f}" for name in columns) + " |" for row in found]
    errors = {name: max(abs(row[name] - 1) for row in found) for name in columns if name.endswith("ratio")}
    lines.append("\nLargest error: " + ", ".join(f"{name} {value:.1%}" for name, value in errors.items()) + ".")
    record(
        "Planned and measured, two CPU ranks", "\n".join(lines), {"rows": found, "largest_error": errors}, options.out
    )


if __name__ == "__main__":
    main()
