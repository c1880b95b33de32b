"""`dist-lm plan --probe` for many runs: planned beside measured memory and step time of two CPU ranks.

    python bench/plan.py [--models bert gpt2 t5] [--batches 16x8 64x16] [--stages 0 1 2 3] [--memory-only]
                         [--work FOLDER] [--out bench/results/plan.md]

Enters: nothing; the text is the docs corpus.  Leaves: a table.  A batch is rows in all x rows of a
micro-batch at most: 16x8 is one micro-step, 64x16 two.  Memory is the peak of a rank's resident memory in
four steps, freed memory returned at once (dist_lm/plan/probe.py).
Step times: the run whose rate the plan takes, on micro-batches half as large, and one run a stage live at
once and take turns of some seconds, so that what the machine does beside them meets all alike; medians of
the steps within turns.  `held` is the peak of memory in those runs, as glibc comes.
About three quarters of an hour on two idle cores, a quarter of that with --memory-only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.docs_data import corpus, prepared
from bench.recorded import record
from bench.turns import Program, take_turns
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.worker import prepare_environment

RANKS, CORPUS_MB = 2, 4
TURN_S = 10.0
SETTLES_S = 0.5
"""Of a turn, not counted: ranks that stood still fetch their memory again."""
STEPS, TURNS = 20, 4
"""That a run makes at least within its turns, and in so many of them."""
ENDLESS = 1_000_000
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
    from dist_lm.plan.probe import half_batch, measured_gib, with_rate

    machine = machine_of("cpu", RANKS, "fp32")
    for family in options.models:
        path = recipe(folder, family)
        for batch in options.batches:
            in_all, most = batch.split("x")
            sizes = [f"batch.global={in_all}", f"batch.micro={most}"]
            planned = make_plan(load_run(path, sizes).config, machine, Options())
            stages = {stage: [*sizes, f"zero={stage}"] for stage in options.stages}
            found: dict[int, InTurns] = {}
            if not options.memory_only:
                smaller = [*sizes, *half_batch(planned)]
                half, *others = in_turns(path, [smaller, *stages.values()])
                found = dict(zip(stages, others, strict=True))
                work = make_plan(load_run(path, smaller).config, machine, Options())
                rated = with_rate(machine, work, half.step_s, half.update_s)
                planned = make_plan(load_run(path, sizes).config, rated, Options(mfu=1.0))
            for stage, overrides in stages.items():
                said = planned.stage(stage)
                row: dict[str, Any] = {"run": f"{family} mini {batch}, zero {stage}", "planned_gib": said.total_gib}
                row["measured_gib"] = measured_gib(path, overrides, ranks=RANKS)
                row["memory_ratio"] = said.total_gib / row["measured_gib"]
                if found:
                    row |= {"held_gib": found[stage].held_gib, "steps": found[stage].steps}
                    row |= {"planned_s": said.step_s, "measured_s": found[stage].step_s}
                    row["time_ratio"] = said.step_s / found[stage].step_s
                print(json.dumps(row), file=sys.stderr, flush=True)
                yield row


class Run(Program):
    """A run without end that takes turns with others."""

    def __init__(self, config: Path, overrides: list[str], folder: Path) -> None:
        from dist_lm.plan.probe import training

        self._metrics = RunDir(folder).metrics
        command = training(config, overrides, folder, ranks=RANKS, steps=ENDLESS)
        super().__init__(command, folder.with_suffix(".log"), dict(os.environ))

    def steps(self) -> list[list[float]]:
        """Seconds of its steps, by turn; turns without a whole step are left out."""
        ended_at = (record["time"] for record in read_metrics(self._metrics, "train"))
        inside = self.inside(ended_at, settles_s=SETTLES_S)
        return [[after - before for before, after in pairwise(times)] for times in inside if len(times) > 1]

    def has_enough(self) -> bool:
        turns = self.steps()
        return len(turns) >= TURNS and sum(map(len, turns)) >= STEPS

    def seen(self) -> InTurns:
        records = read_metrics(self._metrics, "train")
        steps = [seconds for turn in self.steps() for seconds in turn]
        # The median leaves out the few that a turn's end has cut.
        update_s = median(record["optimizer_seconds"] for record in records)
        return InTurns(median(steps), update_s, max(record["memory_gib"] for record in records), len(steps))


@dataclass(frozen=True)
class InTurns:
    """What a run showed in its turns."""

    step_s: float
    update_s: float
    """Of it, after the backward pass."""
    held_gib: float
    steps: int


def in_turns(config: Path, runs: list[list[str]]) -> list[InTurns]:
    """Runs of these overrides take turns until each has made enough steps."""
    with tempfile.TemporaryDirectory(prefix="dist_lm-turns-") as name:
        parties = [Run(config, overrides, Path(name) / str(number)) for number, overrides in enumerate(runs)]
        try:
            take_turns(parties, TURN_S, until=lambda: all(party.has_enough() for party in parties))
            return [party.seen() for party in parties]
        finally:
            for party in parties:
                party.end()


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
