"""How long one waits: for help, for a checked configuration, for the first step of a run.

Enters: this machine's CPU.  Leaves: a table, and JSON; the least of several starts.

    python bench/start.py --out bench/results/start.md

help_s, config_check_s     whole commands; neither imports torch
first_step_s               from `dist-lm train` on two ranks of the demo's model to the end of the first step, by phase
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.checkpoints import Folders, started_at
from bench.recorded import record
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.conftest import topics_data
from tests.gloo_ranks import REPOSITORY, environment, write_recipe

GOALS = {"help_s": 0.3, "config_check_s": 1.5}
MODEL = {"size": "tiny", "overrides": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}


def seconds_of(*words: str | Path) -> float:
    """Wall time of a `dist-lm` command."""
    began = time.perf_counter()
    command = [str(Path(sys.executable).with_name("dist-lm")), *(str(word) for word in words)]
    subprocess.run(command, env=environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def phases(data: Path, folder: Path) -> dict[str, float]:
    """Seconds of each phase of one start."""
    folder.mkdir()
    settings: dict[str, Any] = {"model": MODEL, "batch__micro": 16, "zero": 2, "run__steps": 2}
    recipe, run = write_recipe(folder / "recipe.yaml", data, **settings), RunDir(folder / "run")
    launched_at = time.time()
    words = [sys.executable, "-m", "dist_lm", "train", "-c", str(recipe), "--cpu", "2"]
    process = subprocess.Popen(words, env=environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    while run.next_attempt() < 2:
        if process.poll() is not None:
            raise SystemExit(f"training ended with {process.returncode} before it began")
        time.sleep(0.01)
    began_at = max(started_at(pid) for pid in run.attempt_facts(1)["pids"])
    if process.wait():
        raise SystemExit(f"training ended with {process.returncode}")
    facts = run.attempt_facts(1)
    stepped_at = read_metrics(run.metrics, "train")[0]["time"]
    return {
        "first_step_s": stepped_at - launched_at,
        "until_ranks_started": began_at - launched_at,
        "connect_inputs_and_model": facts["began_at"] - began_at,
        "engine": facts["resumed_at"] - facts["began_at"],
        "first_step": stepped_at - facts["resumed_at"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a .md file; the JSON stands beside it")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = topics_data.__wrapped__(Folders(folder))  # type: ignore[attr-defined]
        recipe = write_recipe(folder / "recipe.yaml", data)
        figures = {
            "help_s": min(seconds_of("--help") for _ in range(given.repeats)),
            "config_check_s": min(seconds_of("config", "check", "-c", recipe) for _ in range(given.repeats)),
            **min(
                (phases(data, folder / f"start-{number}") for number in range(given.repeats)),
                key=lambda one: one["first_step_s"],
            ),
        }
    rows = [f"| {name} | {value:.2f} | {GOALS.get(name, '')} |" for name, value in figures.items()]
    record("Starts", "\n".join(["| | s | goal |", "|---|---|---|", *rows]), figures, given.out)


if __name__ == "__main__":
    main()
