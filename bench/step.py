"""A training step of a small BERT and a small GPT-2: bare PyTorch, DDP, HF Trainer, DeepSpeed, dist_lm.

    python bench/step.py [--rounds 10] [--rows N] [--seq-len 128] [--fp32] [--out bench/results/step.md]

How it measures: real text (the documentation of the installed packages), one thread a rank, gloo.  All
variants of a process group hold the same first weights and take the same rows; they take turns, step
by step, in an order that rotates, after two steps of warm-up.  HF Trainer's steps are timed by its own
callbacks, and the others take their turn inside them.  `bare` stands twice: where the two differ by
more than 5 % (`aa`), the machine was too busy for the figures to be used.  A ratio is one of medians;
the JSON has it for the processes' CPU time, which other work on the machine disturbs least (it leaves
out what a rank waits for the other), and under `wall` for the time on the clock.
Same mathematics: `bare`, `ddp`, `deepspeedN` (its own defaults) and `zeroN` (dist_lm) compute the same
loss, with logits where targets are; `plain_head` and HF Trainer compute them everywhere.  `tuned` is
dist_lm at stage 1 in bf16, with samples that share rows (`_packed`) where there is padding to save.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import step_report

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 900


def groups(models: list[str]) -> list[dict[str, Any]]:
    """The process groups, each with the variants that take turns in it."""
    found: list[dict[str, Any]] = []

    def add(
        model: str, name: str, ranks: int, variants: str, *, leader: str = "", accumulation: int = 1, share: float = 1
    ) -> None:
        words = {"leader": leader, "accumulation": accumulation, "share": share}
        found.append(
            {"group": f"{model} {name}", "model": model, "ranks": ranks, "variants": variants.split(), **words}
        )

    for model in models:
        # The rows of the other model are full.
        packed = " zero1_packed" if model == "bert" else ""
        alone = f"bare bare_again plain_head deepspeed1 zero0 zero1 bare_bf16 zero1_bf16{packed}"
        add(model, "one rank", 1, alone, share=1.5)
        add(
            model,
            "two ranks",
            2,
            "bare bare_again ddp deepspeed2 zero1 zero2 zero3 ddp_bf16 zero1_bf16 tuned",
            leader="hf_trainer",
        )
        add(
            model,
            "two ranks, 4 micro-steps",
            2,
            "ddp bare bare_again deepspeed2 zero1 zero2",
            accumulation=4,
            share=0.5,
        )
        add(model, "two ranks, HF + DeepSpeed", 2, "bare bare_again zero2 tuned", leader="hf_deepspeed")
    return found


def run_group(plan: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Seconds of each variant's steps, by rank."""
    from dist_lm.cluster.local import free_port

    path = folder / f"plan-{plan['group'].replace(' ', '-')}.json"
    path.write_text(json.dumps({**plan, "folder": str(folder)}))
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(plan["ranks"]),
        "LOCAL_WORLD_SIZE": str(plan["ranks"]),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "ACCELERATE_USE_CPU": "true",
    }
    command = [sys.executable, str(HERE / "step_ranks.py"), str(path)]
    processes = []
    for rank in range(plan["ranks"]):
        log = (folder / f"{path.name}.log.{rank}").open("wb")
        variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=subprocess.STDOUT))
    try:
        codes = [process.wait(TIMEOUT_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(codes):
        tails = "\n".join((folder / f"{path.name}.log.{rank}").read_text()[-3000:] for rank in range(plan["ranks"]))
        raise SystemExit(f"{plan['group']}: ranks ended with {codes}\n{tails}")
    results = [json.loads(Path(f"{path}.{rank}").read_text()) for rank in range(plan["ranks"])]
    return {**plan, "seconds": [result["seconds"] for result in results], "padding": results[0]["padding"]}


def data_wait(folder: Path, model: str, seq_len: int) -> float:
    """Share of a run's time that its ranks wait for rows and make micro-batches of them.

    A run of two ranks; the records are those after the first, in which the reader begins.
    """
    import step_data

    from dist_lm.metrics import read_metrics

    recipe = step_data.RECIPES[model]
    with tempfile.TemporaryDirectory() as run:
        settings = {
            "task": recipe.task,
            "model": recipe.model,
            "data": {
                "train": str(folder / f"{model}-{seq_len}" / "train"),
                "tokenizer": str(folder / f"{model}-tokenizer"),
            },
            "batch": {"global": 2 * recipe.rows, "micro": recipe.rows},
            "optim": {"lr": 1e-3},
            "run": {"dir": run, "steps": 20, "log_every": 5},
            "deepspeed": str(HERE.parent / "ds_configs" / "cpu_gloo.json"),
        }
        path = folder / "run.yaml"
        path.write_text(json.dumps(settings))
        command = [sys.executable, "-m", "dist_lm", "train", "-c", str(path), "--cpu", "2"]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        subprocess.run(command, env=variables, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S)
        records = read_metrics(Path(run) / "metrics.jsonl", "train")[1:]
    return sum(record["data_seconds"] for record in records) / sum(record["step_seconds"] for record in records)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--rows", type=int, help="of a micro-batch on one rank; default: the recipe's, 16 and 8")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--models", nargs="+", default=["bert", "gpt"], choices=["bert", "gpt"])
    parser.add_argument("--fp32", action="store_true", help="without bf16, which some CPUs compute many times slower")
    parser.add_argument("--only", default="", help="part of the names of the process groups to run")
    parser.add_argument("--work", type=Path, help="where the corpus is kept for the next call")
    parser.add_argument("--out", type=Path, help="a .md file for the table; a .json beside it")
    options = parser.parse_args()
    import step_data

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        step_data.prepare_text(folder, options.seq_len)
        results = []
        for plan in groups(options.models):
            if options.only not in plan["group"]:
                continue
            if options.fp32:
                plan["variants"] = [name for name in plan["variants"] if "bf16" not in name and name != "tuned"]
            rounds = max(round(options.rounds * plan["share"]), 3)
            rows = options.rows or step_data.RECIPES[plan["model"]].rows
            results.append(run_group({**plan, "rounds": rounds, "rows": rows, "seq_len": options.seq_len}, folder))
            print(f"measured: {plan['group']}", flush=True)
        figures = step_report.figures(results)
        if not options.only:
            figures["data_wait"] = round(data_wait(folder, options.models[0], options.seq_len), 5)
    step_report.record(results, figures, options.out)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
