"""A few real steps, to set beside the plan.

Enters: a configuration, CPU ranks of this machine.  Leaves: memory and time of a step.
Promises: the run folder of the configuration is not touched; what the probe wrote is removed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from dist_lm.errors import ConfigError, EnvironmentFault
from dist_lm.metrics import read_metrics

_WARM_UP = 2
_LEAST_STEPS = _WARM_UP + 2
# Steps as they will be, and nothing beside them.
_PLAIN = (
    *("run.log_every=1", "run.eval_every=0", "run.save_every=1000000"),
    "data.stages=[]",
    *("optim.schedule.kind=constant", "optim.schedule.warmup_steps=0", "optim.schedule.decay_steps=0"),
)


@dataclass(frozen=True)
class Measured:
    """Of one rank."""

    memory_gib: float
    step_s: float
    tokens_s: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(config: Path, overrides: Sequence[str], *, ranks: int, steps: int) -> Measured:
    """Train `steps` steps.  Raises ConfigError for too few, EnvironmentFault where the run does not end well."""
    if steps < _LEAST_STEPS:
        raise ConfigError(f"--probe {steps} steps are too few", do=f"Write {_LEAST_STEPS} or more: two are warm-up.")
    with tempfile.TemporaryDirectory(prefix="dist_lm-probe-") as folder:
        run = Path(folder) / "run"
        own = [f"run.dir={run}", f"run.steps={steps}", *_PLAIN]
        command = [sys.executable, "-m", "dist_lm", "train", "-c", str(config), "--cpu", str(ranks), "--max-restarts=0"]
        done = subprocess.run([*command, *overrides, *own], capture_output=True, text=True)
        records = read_metrics(run / "metrics.jsonl", "train")
        if done.returncode:
            why = "\n".join(done.stderr.splitlines()[-8:])
            raise EnvironmentFault(f"the probe ended with exit code {done.returncode}", where=str(config), why=why)
    steady = records[_WARM_UP:]
    return Measured(
        max(record["memory_gib"] for record in records),
        median(record["step_seconds"] for record in steady),
        median(record["tokens_per_second"] for record in steady),
    )
