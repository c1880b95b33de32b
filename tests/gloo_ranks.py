"""Whole runs by the command line: a recipe file, the local launcher, and what the run measured."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.rank_scenarios import losses, scenario

__all__ = ["REPOSITORY", "environment", "losses", "run_command", "train_locally", "write_recipe"]
REPOSITORY = Path(__file__).resolve().parent.parent
_RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def write_recipe(path: Path, data_folder: Path, **dotted: Any) -> Path:
    """A YAML for a small BERT on the topics data; `dotted` are keys with `__` for the dot.

    The run folder is `run` beside the file, unless `run__dir` says otherwise.
    """
    run_dir = Path(dotted.pop("run__dir", path.parent / "run"))
    path.write_text(yaml.safe_dump(scenario(data_folder, run_dir, **dotted)))
    return path


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a launcher on this machine's CPU; one thread a rank, so that sums are equal."""
    inherited = {name: value for name, value in os.environ.items() if name not in _RANK_VARIABLES}
    # `python` and `deepspeed` are those of this environment, as for a user who activated it.
    inherited["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{inherited.get('PATH', os.defpath)}"
    return {**inherited, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(extra or {})}


def run_command(
    words: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run to the end, from the repository's root; a hang is an error after `timeout_s`."""
    process = subprocess.Popen(
        [str(word) for word in words],
        env=environment(env),
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # Launchers end their ranks on SIGTERM; SIGKILL would leave them behind.
        process.terminate()
        output, errors = process.communicate(timeout=60)
        raise AssertionError(f"{words} took over {timeout_s} s\n{output}\n{errors}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def train_locally(
    config_path: Path,
    *overrides: str,
    num_ranks: int = 2,
    max_restarts: int = 0,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240,
) -> subprocess.CompletedProcess[str]:
    """`dist-lm train` with gloo ranks on this machine."""
    return run_command(
        [
            *(sys.executable, "-m", "dist_lm", "train", "-c", config_path, *overrides),
            *("--cpu", str(num_ranks), "--max-restarts", str(max_restarts)),
        ],
        env=env,
        timeout_s=timeout_s,
    )
