"""A few real steps on CPU ranks of this machine, beside what was planned.

Enters: a configuration, its plan.  Leaves: the same plan at the rate that this machine showed, and what
the run itself measured.
Promises: nothing of the run folder is touched: runs are made in a folder of their own, which is removed.
The rate comes from micro-batches half as large as the run's, so that the run's own time is foretold and
not repeated.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from dist_lm.deepspeed_config import load_run
from dist_lm.errors import ConfigError, EnvironmentFault
from dist_lm.metrics import read_metrics
from dist_lm.plan.baseline import EXACT_MALLOC
from dist_lm.plan.plan import Machine, Options, Plan, make_plan

_WARM_UP = 2
_LEAST_STEPS = _WARM_UP + 2
_BETWEEN_SIGNALS_S = 0.5
"""Two that come at the same time are one."""
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
    """Peak of resident memory where freed memory returns at once (EXACT_MALLOC): what the run needs."""
    held_gib: float
    """The same peak as glibc comes: with what it keeps of freed memory."""
    step_s: float
    tokens_s: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def calibrated(config: Path, overrides: Sequence[str], planned: Plan, machine: Machine, *, steps: int) -> Machine:
    """The machine with the rate of its ranks, as micro-batches of half the rows show it, all ranks at work."""
    smaller = [*overrides, *half_batch(planned)]
    records = _train(config, smaller, ranks=machine.ranks, steps=steps)
    step_s, update_s = (median(record[f"{part}_seconds"] for record in records) for part in ("step", "optimizer"))
    return with_rate(machine, make_plan(load_run(config, smaller).config, machine, Options()), step_s, update_s)


def half_batch(planned: Plan) -> list[str]:
    """Overrides: one micro-batch of half the rows on each rank."""
    rows = max(1, planned.micro_rows // 2)
    return [f"batch.micro={rows}", f"batch.global={rows * planned.ranks}"]


def with_rate(machine: Machine, work: Plan, step_s: float, update_s: float) -> Machine:
    """The machine whose ranks do a step of `work` in `step_s` seconds, `update_s` of them after the backward pass.

    Those do not grow with the rows; the others make the FLOP/s of a rank.
    """
    compute_s = max(step_s - update_s - work.stage(work.configured).communication_s, step_s / 2)
    return replace(machine, flops=work.flops_a_step / machine.ranks / compute_s, update_s=update_s)


def measure(config: Path, overrides: Sequence[str], *, ranks: int, steps: int) -> Measured:
    """The run's own first steps, twice: for time, and for memory."""
    steady = _train(config, overrides, ranks=ranks, steps=steps)
    return Measured(
        memory_gib=measured_gib(config, overrides, ranks=ranks),
        held_gib=max(record["memory_gib"] for record in steady),
        step_s=median(record["step_seconds"] for record in steady),
        tokens_s=median(record["tokens_per_second"] for record in steady),
    )


def measured_gib(config: Path, overrides: Sequence[str], *, ranks: int) -> float:
    """Peak of a rank's resident memory in a few steps, under EXACT_MALLOC."""
    records = _train(config, overrides, ranks=ranks, steps=_LEAST_STEPS, variables=EXACT_MALLOC)
    return max(float(record["memory_gib"]) for record in records)


def _train(
    config: Path, overrides: Sequence[str], *, ranks: int, steps: int, variables: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Records of the steps after the warm-up.

    Raises ConfigError for too few steps, EnvironmentFault where the run does not end well.
    """
    if steps < _LEAST_STEPS:
        raise ConfigError(f"--probe {steps} steps are too few", do=f"Write {_LEAST_STEPS} or more: two are warm-up.")
    with _terminated_as_interrupted(), tempfile.TemporaryDirectory(prefix="dist_lm-probe-") as folder:
        run = Path(folder) / "run"
        command = training(config, overrides, run, ranks=ranks, steps=steps)
        code, told = _to_its_end(command, {**os.environ, **(variables or {})})
        records = read_metrics(run / "metrics.jsonl", "train")
        if code:
            why = "\n".join(told.splitlines()[-8:])
            raise EnvironmentFault(f"the probe ended with exit code {code}", where=str(config), why=why)
    return records[_WARM_UP:]


def training(config: Path, overrides: Sequence[str], run_dir: Path, *, ranks: int, steps: int) -> list[str]:
    """The command of a run whose steps are all alike, in a folder of its own."""
    own = [f"run.dir={run_dir}", f"run.steps={steps}", *_PLAIN]
    command = [sys.executable, "-m", "dist_lm", "train", "-c", str(config), "--cpu", str(ranks), "--max-restarts=0"]
    return [*command, *overrides, *own]


def _to_its_end(command: list[str], environment: dict[str, str]) -> tuple[int, str]:
    """Exit code and messages of a run.  Whoever interrupts it ends its ranks too: they write into its folder."""
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    with run:
        try:
            _, told = run.communicate()
        except BaseException:
            # The launcher ends its ranks at once where it is told twice.
            run.terminate()
            time.sleep(_BETWEEN_SIGNALS_S)
            run.terminate()
            run.communicate()
            raise
    return run.returncode, told


@contextlib.contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM leaves nothing behind either.  Python lets the main thread alone hear it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
