"""Files of a run, as training writes them, without a training."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from dist_lm.run_dir import RunDir
from tests.recipe_text import RECIPE


def write_run(folder: Path, *, lr: float = 1e-4, what: str = "a rank was killed") -> RunDir:
    """A run that was killed at step 60, went on from step 50, and went back from step 90 to step 80."""
    run_dir = RunDir(folder)
    run_dir.begin()
    run_dir.identity.write_text(json.dumps({"run.steps": 100}))
    values = yaml.safe_load(RECIPE)
    values["optim"]["lr"] = lr
    run_dir.config.write_text(yaml.safe_dump(values))
    run_dir.origins.write_text(
        json.dumps({"optim.lr": f"override `optim.lr={lr}`", "run.steps": "my.yaml:9", "run.keep": "default"})
    )
    first = run_dir.open_attempt({"from_step": 0, "world_size": 2, "launcher": "local"})
    run_dir.close_attempt(first, reason="crash", step=60, useful_s=6.0, what=what)
    second = run_dir.open_attempt({"from_step": 50, "world_size": 2, "launcher": "local"})
    run_dir.close_attempt(second, reason="done", step=100, useful_s=5.0)
    records = [
        {
            **{"kind": "train", "step": step, "time": 0.0, "loss": 8.0 - step / 20, "lm_loss": 8.0 - step / 20},
            **{"learning_rate": lr, "tokens_per_second": 1e4, "epoch_wiki": step / 50, "step_seconds": 0.1},
            **{
                "tflops": 40.0,
                "mfu": 0.4,
                "memory_gib": 1.5,
                "grad_norm": 1.0,
                "data_seconds": 0.01,
                "forward_seconds": 0.03,
                "backward_seconds": 0.05,
            },
        }
        for step in range(10, 101, 10)
    ]
    records[3]["loss"] = float("nan")
    records[5]["evaluation_seconds"] = 0.02
    classes = {name: {"precision": 0.8, "recall": 0.7, "f1": 0.75, "count": 10.0} for name in ("good", "bad")}
    confusion = {"good": {"good": 7.0, "bad": 3.0}, "bad": {"good": 0.0, "bad": 10.0}}
    tables = {"": {"classes": classes, "confusion": confusion}}
    records.append({"kind": "eval", "step": 100, "time": 0.0, "loss": 3.5, "f1": 0.75, "tables": tables})
    records.append({"kind": "event", "step": 70, "time": 0.0, "event": "block_replaced", "shard": "train-3.tar"})
    records.append({"kind": "event", "step": 100, "time": 0.0, "event": "saved"})
    records.append({"kind": "event", "step": 80, "time": 0.0, "event": "rolled_back", "bad_step": 90})
    run_dir.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir
