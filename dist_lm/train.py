"""The loop: one for pretraining and fine-tuning, under every launcher.

Enters: a configuration and the ranks' environment.  Leaves: a run folder.
Promises: the same command goes on where the run folder stands; every collective of a step stands
here, in order.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from dist_lm.assemble import Parts, assemble, open_stream
from dist_lm.checkpoint import commit
from dist_lm.checkpoint.commit import Checkpoint, Progress, Reader
from dist_lm.checkpoint.fragments import own_fragments, restore
from dist_lm.config_files import LoadedConfig
from dist_lm.data.rows import Rows, StepRows
from dist_lm.errors import DataError, DistLMError, Diverged, StopRequested
from dist_lm.evaluate import evaluate
from dist_lm.faults import fault_point
from dist_lm.metrics import MetricsLog, Window
from dist_lm.ranks import Ranks
from dist_lm.run_dir import RunDir
from dist_lm.schedule import BatchPlan, learning_rate
from dist_lm.stop import StopFlag
from dist_lm.tasks.base import MicroBatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    progress: Progress
    last_metrics: dict[str, float]
    heldout_metrics: dict[str, float]
    resumed_step: int
    seconds: float


def train(loaded: LoadedConfig, ranks: Ranks, *, stop: StopFlag, launcher: str) -> Outcome:
    """Train until the last step.

    Raises StopRequested when somebody asked to stop and a checkpoint is saved; any other
    DistLMError as its class says.
    """
    parts = assemble(loaded, ranks, launcher=launcher)
    try:
        return _Loop(parts, stop).run()
    finally:
        parts.engine.close()


class _Loop:
    """State of the loop between two steps."""

    def __init__(self, parts: Parts, stop: StopFlag) -> None:
        self.parts, self.stop = parts, stop
        self.config, self.ranks, self.engine, self.task = parts.config, parts.ranks, parts.engine, parts.task
        self.run_dir: RunDir = parts.run_dir
        self.progress = self._resume()
        self.resumed_step = self.progress.step
        self.saved_step = self.progress.step
        self.metrics: MetricsLog | None = None
        self.window = Window()
        self.last_metrics: dict[str, float] = {}
        self.heldout_metrics: dict[str, float] = {}
        self.stop_agreed = False
        self.grad_norm: float | Tensor = 0.0
        self.learning_rate = 0.0

    def run(self) -> Outcome:
        began_at = time.monotonic()
        if self.ranks.is_first:
            self.metrics = MetricsLog(self.run_dir.metrics, self.run_dir.tensorboard, resumed_step=self.resumed_step)
        try:
            self._steps()
            if self.stop_agreed:
                raise StopRequested(
                    f"stopped at step {self.progress.step} of {self.config.run.steps}",
                    where=str(self.run_dir.path),
                    why=f"Reason: {self.stop.reason or 'another rank was asked to stop'}. A checkpoint is saved.",
                    do="Run the same command to go on.",
                )
        finally:
            if self.metrics:
                self.metrics.close()
        return Outcome(
            self.progress,
            self.last_metrics,
            self.heldout_metrics,
            self.resumed_step,
            time.monotonic() - began_at,
        )

    def _resume(self) -> Progress:
        checkpoint = commit.newest_verified(self.run_dir.checkpoints, self.ranks)
        fresh = Progress(step=0, position=0, data_fingerprint=self.parts.data.fingerprint())
        if checkpoint is None:
            return self._stamp(fresh)
        if checkpoint.progress.data_fingerprint != self.parts.data.fingerprint(checkpoint.progress.position):
            raise DataError(
                "the checkpoint's position counts rows of another data set or order",
                where=str(checkpoint.folder),
                do="Use the data, weights, data.lanes, data.era and run.seed that the run was begun with.",
            )
        began_at = time.monotonic()
        self._load(checkpoint)
        if self.ranks.is_first:
            log.info(
                "resume  step %d from %s, verified %d files (%.1f s)",
                checkpoint.progress.step,
                checkpoint.folder.name,
                len(checkpoint.files),
                time.monotonic() - began_at,
            )
        return self._stamp(checkpoint.progress)

    def _load(self, checkpoint: Checkpoint) -> None:
        reader = Reader(checkpoint)
        reader.expect(self.parts.shapes)
        restore(self.engine, reader.read, step=checkpoint.progress.step)

    def _stamp(self, progress: Progress, **changes: Any) -> Progress:
        """The progress with who trains now."""
        now = {
            "world_size": self.ranks.world_size,
            "zero_stage": self.engine.stage,
            "precision": self.config.precision,
        }
        return Progress(**{**asdict(progress), **now, **changes})

    def _steps(self) -> None:
        run = self.config.run
        if self.progress.step >= run.steps:
            self._evaluate()
            return
        position = self.progress.position
        with open_stream(self.parts, position=position) as stream:
            batches = iter(stream)
            while self.progress.step < run.steps and not self.stop_agreed:
                self._one_step(batches)
                self._after_step()

    def _one_step(self, batches: Iterator[StepRows]) -> None:
        step = self.progress.step + 1
        self._fault("before_forward", step)
        began = time.perf_counter()
        failure: DistLMError | None = None
        micro_batches: list[MicroBatch] = []
        try:
            step_rows = next(batches)
            micro_batches = [self.task.collate(rows) for rows in divide(step_rows.rows, self.parts.plan)]
        except DistLMError as error:
            failure = error
        local = [sum(batch.targets[name] for batch in micro_batches) for name in self.task.objectives]
        tokens = sum(batch.tokens for batch in micro_batches)
        # One small sum over ranks a step: targets (for the token-weighted loss), tokens, whether
        # anybody was asked to stop, and whether anybody has no data.
        *counts, global_tokens, stops, failures = self.ranks.sum(
            [*local, tokens, bool(self.stop.reason), failure is not None]
        )
        if failures:
            self.ranks.raise_together(failure)
        targets = dict(zip(self.task.objectives, counts, strict=True))
        self.stop_agreed = stops > 0
        rate = learning_rate(self.config.optim, step=step, steps=self.config.run.steps)
        data_s = time.perf_counter() - began
        result = self.engine.step(
            micro_batches, global_targets=targets, learning_rate=rate, position=step_rows.position
        )
        self.progress = self._stamp(
            self.progress,
            step=step,
            position=step_rows.next_position,
            data_fingerprint=self.parts.data.fingerprint(step_rows.next_position),
            tokens=self.progress.tokens + int(global_tokens),
        )
        self.grad_norm, self.learning_rate = result.grad_norm, rate
        self.window.add(
            result.sums,
            targets,
            tokens=float(tokens),
            slots=float(sum(batch.slots for batch in micro_batches)),
            padding=float(sum(batch.slots for batch in micro_batches) - tokens),
            data_seconds=data_s,
            **{f"{name}_seconds": value for name, value in result.seconds.items()},
        )
        self._fault("after_step", step)

    def _after_step(self) -> None:
        run, step = self.config.run, self.progress.step
        last = step == run.steps or self.stop_agreed
        if step % run.log_every == 0 or last:
            self._record()
        if (run.eval_every and step % run.eval_every == 0 and not self.stop_agreed) or step == run.steps:
            self._evaluate()
        if step % run.save_every == 0 or last:
            self._save()

    def _record(self) -> None:
        values = self.window.reduce(self.ranks)
        values |= {
            "learning_rate": self.learning_rate,
            "grad_norm": float(self.grad_norm),
            "tokens": float(self.progress.tokens),
            **self.parts.data.epochs(self.progress.position),
        }
        self.last_metrics = values
        step = self.progress.step
        if not math.isfinite(values["loss"]):
            raise self._diverged(f"loss {values['loss']:.4g}")
        self._refuse_bad_gradient()
        if self.metrics:
            self.metrics.write("train", step, values)
            log.info("%s", _line(step, self.config.run.steps, values))

    def _refuse_bad_gradient(self) -> None:
        # The norm is the same on every rank: all raise, or none.
        if not math.isfinite(float(self.grad_norm)):
            raise self._diverged(f"gradient norm {float(self.grad_norm):.4g}")

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"{what} at step {self.progress.step}",
            where=str(self.run_dir.path),
            why=f"The last checkpoint, of step {self.saved_step}, is from before.",
            do="Lower optim.lr, lengthen optim.schedule.warmup_steps, or use precision=fp32.",
        )

    def _evaluate(self) -> None:
        heldout_sets = self.config.data.heldout_sets
        if not heldout_sets:
            return
        self._fault("in_evaluation", self.progress.step)
        began_at = time.monotonic()
        self.heldout_metrics = {}
        for set_name, location in heldout_sets.items():
            values = evaluate(
                self.engine,
                self.task,
                location,
                self.ranks,
                micro_rows=self.config.batch.micro_rows,
                seed=self.config.run.seed,
            )
            prefix = f"{set_name}_" if set_name else ""
            self.heldout_metrics |= {prefix + name: value for name, value in values.items()}
        if self.metrics:
            self.metrics.write("eval", self.progress.step, self.heldout_metrics)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in self.heldout_metrics.items())
            log.info("step %d  eval  %s  (%.1f s)", self.progress.step, shown, time.monotonic() - began_at)

    def _save(self) -> None:
        if self.saved_step == self.progress.step:
            return
        self._refuse_bad_gradient()
        began_at = time.monotonic()
        folder = commit.save(
            self.run_dir.checkpoints,
            self.progress,
            own_fragments(self.engine),
            self.ranks,
            attempt=self.parts.attempt,
            keep=self.config.run.keep,
        )
        seconds = time.monotonic() - began_at
        self.saved_step = self.progress.step
        self.window.add_seconds(checkpoint_seconds=seconds)
        if self.metrics:
            self.metrics.write("event", self.progress.step, {"saved": folder.name, "save_seconds": seconds})
            log.info("step %d  saved %s in %.2f s", self.progress.step, folder.name, seconds)

    def _fault(self, point: str, step: int) -> None:
        fault_point(point, rank=self.ranks.rank, step=step, attempt=self.parts.attempt)


def divide(rows: Rows, plan: BatchPlan) -> list[Rows]:
    """This rank's rows as the plan's micro-batches; the last is filled with rows of weight zero."""
    size = plan.rows_per_micro
    return [rows.take(slice(begin, begin + size)).padded(size) for begin in range(0, size * plan.micro_steps, size)]


def _line(step: int, steps: int, values: dict[str, float]) -> str:
    losses = "  ".join(
        f"{name} {value:.4f}"
        for name, value in values.items()
        if name == "loss" or name.endswith(("_loss", "_accuracy"))
    )
    waiting = values["data_seconds"] / values["step_seconds"]
    return (
        f"step {step}/{steps}  {losses}  lr {values['learning_rate']:.2e}  gnorm {values['grad_norm']:.2f}  "
        f"{values['tokens_per_second'] / 1e3:.1f}k tok/s  data {waiting:.1%}"
    )
