"""The loop: one for pretraining and fine-tuning, under every launcher.

Enters: a configuration and the ranks' environment.  Leaves: a run folder.
Promises: the same command goes on where the run folder stands; every collective of a step stands
here, in order.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from dist_lm import garbage
from dist_lm.assemble import Parts, assemble, open_stream
from dist_lm.batches import Batch, LocalBatches
from dist_lm.checkpoint.commit import Retention
from dist_lm.checkpoint.fragments import loss_scale, own_fragments
from dist_lm.checkpoint.manifest import Progress
from dist_lm.checkpoint.nearest import LocalCopies
from dist_lm.checkpoint.policy import SavePolicy
from dist_lm.checkpoint.store import open_store, step_name
from dist_lm.checkpoint.writer import RETRY_PAUSES_S, Writer
from dist_lm.config_files import LoadedConfig
from dist_lm.console import Console, Scene, on_terminal
from dist_lm.engine import StepResult, Sums
from dist_lm.errors import DistLMError, StopRequested
from dist_lm.evaluate import evaluate_all
from dist_lm.faults import fault_point
from dist_lm.header import title
from dist_lm.memory import explained
from dist_lm.metrics import MetricsLog, Window, averages
from dist_lm.model_flops import Utilization
from dist_lm.ranks import Ranks
from dist_lm.resume import SmallState, resume, roll_back, set_damage_aside, stamp, with_state
from dist_lm.sample_log import record_samples
from dist_lm.schedule import learning_rate
from dist_lm.stop import BY_PEER, StopFlag, first_hand


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
    parts = assemble(loaded, ranks, stop=stop, launcher=launcher)
    garbage.keep_all()
    failure: BaseException | None = None
    try:
        return _Loop(parts, stop).run()
    except BaseException as error:
        failure = error
        raise
    finally:
        parts.attempt.end(failure)
        parts.engine.close()


@dataclass(frozen=True)
class _Unread:
    """A step that was trained; its tensors are still on the device."""

    progress: Progress
    """Where the run stood after it."""
    applied: bool | Tensor
    sums: Sums
    targets: dict[str, float]
    host: dict[str, float]
    """Seconds and tokens of this rank."""

    @classmethod
    def of(cls, progress: Progress, batch: Batch, result: StepResult) -> _Unread:
        host = {
            "tokens": float(batch.local_tokens),
            "slots": batch.slots,
            "padding": batch.slots - batch.local_tokens,
            "data_seconds": batch.seconds,
            "peer_seconds": batch.peer_seconds,
            **{f"{name}_seconds": value for name, value in result.seconds.items()},
        }
        return cls(progress, result.applied, result.sums, batch.targets, host)


class _Loop:
    """State of the loop between two steps."""

    def __init__(self, parts: Parts, stop: StopFlag) -> None:
        self.parts, self.stop = parts, stop
        self.config, self.ranks, self.engine, self.task = parts.config, parts.ranks, parts.engine, parts.task
        self.run_dir, self.attempt, self.watch = parts.run_dir, parts.attempt, parts.attempt.watch
        run = self.config.run
        self.store = open_store(run.checkpoints or str(self.run_dir.checkpoints))
        self.run_id = self.ranks.agree(self.run_dir.run_id)
        self.small = SmallState(parts)
        self.copies = LocalCopies.open(run.local_copies, self.run_id, self.ranks)
        self.progress = resume(parts, self.store, self.run_id, self.small, self.copies)
        self.writer = Writer(
            self.store,
            self.ranks,
            run_id=self.run_id,
            attempt=self.attempt.number,
            retention=Retention(run.keep, run.keep_every),
            fence=self.attempt.fence,
            copies=self.copies,
            pauses_s=RETRY_PAUSES_S[: run.save_retries],
        )
        self.resumed_step = self.saved_step = self.progress.step
        self.attempt.resumed_at(self.progress.step)
        self.saves = SavePolicy(run.save_every)
        self.metrics: MetricsLog | None = None
        self.utilization = Utilization(self.ranks, self.config.precision, run.peak_tflops)
        self.window = Window()
        self.unread: list[_Unread] = []
        """Steps of which nobody knows yet whether they were sound."""
        self.last_metrics: dict[str, float] = {}
        self.heldout_metrics: dict[str, float] = {}
        self.stop_agreed = self.save_agreed = False
        self.spoilt = False
        """The last steps were bad enough to go back."""
        self.grad_norm: float | Tensor = 0.0
        self.learning_rate = 0.0

    def run(self) -> Outcome:
        began_at = time.monotonic()
        if self.ranks.is_first:
            self.metrics = MetricsLog(self.run_dir.metrics, self.run_dir.tensorboard, resumed_step=self.resumed_step)
        scene = Scene(title(self.parts), self.config.run.steps, self.resumed_step, self.watch.place)
        self.console = Console(scene, live=self.ranks.is_first and on_terminal())
        try:
            self._train_and_save()
        finally:
            self.console.close()
            self.writer.abandon()
            if self.metrics:
                self.metrics.close()
        if self.stop_agreed:
            reasons = first_hand(self.ranks.gather(self.stop.reason))
            raise StopRequested(
                f"stopped at step {self.progress.step} of {self.config.run.steps}",
                where=str(self.run_dir.path),
                why=f"Reason: {reasons[0] if reasons else BY_PEER}. A checkpoint is saved.",
                do="Run the same command to go on.",
            )
        elapsed_s = time.monotonic() - began_at
        return Outcome(self.progress, self.last_metrics, self.heldout_metrics, self.resumed_step, elapsed_s)

    @property
    def _done(self) -> bool:
        early = self.small.early_stop
        exhausted = early is not None and early.exhausted
        return self.progress.step >= self.config.run.steps or self.stop_agreed or exhausted

    def _train_and_save(self) -> None:
        if self._done:
            self._evaluate()
            return
        while not self._done:
            self._steps()
            if self.spoilt:
                self._roll_back()
        if self.stop_agreed:
            # Where a rank stopped waiting for data, the last step is one that nobody took for the last.
            self._record()
            self._save(None)
        self.watch.enter("checkpoint", self.progress.step)
        # The last save is waited for; its error is everybody's.
        self.writer.finish()
        self._tell_saves()

    def _steps(self) -> None:
        """Until the run ends, has to go back, or has to read anew without what is damaged."""
        parts = self.parts
        stream = open_stream(parts, self.progress)
        with LocalBatches(stream, parts.task, parts.plan, parts.mesh) as batches:
            while not self._done and not self.spoilt and self._one_step(batches):
                if not self.spoilt:
                    self._after_step()
        # A rank that stops waiting for data leaves steps that nobody took for the last.
        self._read()

    def _one_step(self, batches: LocalBatches) -> bool:
        """False: nothing was trained on, as there is damage in the rows, or no time to wait for them."""
        step = self.progress.step + 1
        batch = self._next_batch(batches, step)
        if batch is None:
            return False
        self.watch.enter("step", step)
        self._fault("before_forward", step)
        rate = learning_rate(self.config.optim, step=step, steps=self.config.run.steps)
        with explained(self.parts, step), self.utilization.step(batch.slots):
            result = self.engine.step(
                batch.micro_batches,
                global_targets=batch.targets,
                learning_rate=rate,
                position=batch.rows.position,
                fault=lambda point: self._fault(point, step),
            )
        self.progress = stamp(
            self.parts,
            self.progress,
            step=step,
            position=batch.rows.next_position,
            data_fingerprint=self.parts.data.fingerprint(batch.rows.next_position),
            tokens=self.progress.tokens + batch.global_tokens,
        )
        self.grad_norm, self.learning_rate = result.grad_norm, rate
        self.unread.append(_Unread.of(self.progress, batch, result))
        if self._reads_after(step, result):
            self._read()
        if self.parts.mesh.part == 0:
            record_samples(batch.rows.rows, attempt=self.attempt.number, rank=self.ranks.rank, step=step)
        self._fault("after_step", step)
        return True

    def _next_batch(self, batches: LocalBatches, step: int) -> Batch | None:
        """This step's rows, and the one small sum over ranks that each step has.

        None: there is damage, to be read around; or a rank was asked to stop while it waited for data.
        """
        self.watch.enter("data", step)
        self._fault("before_data", step)
        began = time.perf_counter()
        failure: DistLMError | None = self.writer.error or self.attempt.lost
        local = batches.next(self.stop.is_asked)
        failure = failure or local.failure
        ready = time.perf_counter()
        self._fault("in_collective", step)
        # Targets (for the token-weighted loss), tokens, whether anybody was asked to stop, whether
        # rank 0's clock says that it is time to save, whether anybody has no data, could not save, or
        # lost the run, and whether anybody stopped waiting for data.
        due = self.ranks.is_first and self.saves.is_due(step)
        stop, idle = self.stop.is_asked(), local.is_idle
        *counts, global_tokens, stops, saves, failures, idlers = self.ranks.sum(
            [*local.targets(self.task.objectives), local.tokens, stop, due, failure is not None, idle]
        )
        if failures:
            self.progress, found = set_damage_aside(self.parts, self.progress, failure)
            for damage in found:
                self._event("damage", damage.facts)
            return None
        self.stop_agreed, self.save_agreed = stops > 0, saves > 0
        if idlers:
            batches.hurry()
            return None
        assert local.rows is not None
        targets = dict(zip(self.task.objectives, counts, strict=True))
        waited = (ready - began, time.perf_counter() - ready)
        return Batch(local.rows, local.micro_batches, targets, int(global_tokens), local.tokens, *waited)

    def _reads_after(self, step: int, result: StepResult) -> bool:
        """Whether the host waits for the device here: for what is written, judged, saved or known anyway."""
        run = self.config.run
        due = self._logs_after(step) or self._evaluates_after(step) or self.save_agreed
        return due or bool(run.spike_mads) or isinstance(result.applied, bool)

    def _read(self) -> None:
        """Let the guard see the steps since the last reading, in order, and add them to the window.

        Where one of them spoils the run, it stands where it stood then: later steps count as not trained.
        """
        unread, self.unread = self.unread, []
        for step in unread:
            applied, loss = bool(step.applied), None
            if self.config.run.spike_mads and applied:
                sums = {name: float(value) for name, value in step.sums.items()}
                (loss,) = self.ranks.sum([averages(sums, step.targets)["loss"]])
            # fp16 finds its scale by steps that overflow: only one at the least scale says something.
            scale = loss_scale(self.engine).get("cur_scale", 1.0)
            self.spoilt = self.small.guard.see(applied=applied or scale > 1.0, loss=loss)
            if applied:
                self.window.add(step.sums, step.targets, **step.host)
            else:
                self._event("step_skipped", {"loss_scale": scale}, step.progress.step)
            if self.spoilt:
                self.progress = step.progress
                return

    def _logs_after(self, step: int) -> bool:
        return step % self.config.run.log_every == 0 or step == self.config.run.steps or self.stop_agreed

    def _evaluates_after(self, step: int) -> bool:
        run = self.config.run
        regular = bool(run.eval_every) and step % run.eval_every == 0 and not self.stop_agreed
        return regular or step == run.steps

    def _after_step(self) -> None:
        step = self.progress.step
        if self._logs_after(step):
            self._record()
        best = self._evaluate() if self._evaluates_after(step) else None
        # No periodic save in the middle of bad steps: it could not be gone back to.
        due = self.save_agreed and not self.small.guard.bad_in_row
        if due or best or self._done:
            self._save(best)
        self._tell_saves()

    def _record(self) -> None:
        if not self.window.num_steps:
            return
        values = self.window.reduce(self.ranks)
        values |= self.utilization.rates(values.pop("slots_per_second"))
        values |= {
            "learning_rate": self.learning_rate,
            "grad_norm": float(self.grad_norm),
            "tokens": float(self.progress.tokens),
            **self.parts.data.epochs(self.progress.position),
        }
        self.last_metrics = values
        # The next step's sum tells all ranks that the run is lost; until then nothing is written.
        if self.metrics and not self.attempt.lost:
            self.metrics.write("train", self.progress.step, values)
            self.console.trained(self.progress.step, values)

    def _evaluate(self) -> dict[str, Any] | None:
        """Held-out figures; the entry for BEST.json where they are the best so far."""
        heldout_sets, step = self.config.data.heldout_sets, self.progress.step
        if not heldout_sets:
            return None
        self.watch.enter("evaluation", step)
        self._fault("in_evaluation", step)
        began_at = time.monotonic()
        found = evaluate_all(
            self.engine,
            self.task,
            heldout_sets,
            self.ranks,
            mesh=self.parts.mesh,
            micro_rows=self.parts.micro_rows,
            seed=self.config.run.seed,
            cache=self.parts.cache,
            give_up=self.stop.is_asked,
        )
        if found is None:
            self.stop_agreed = True
            return None
        self.heldout_metrics = figures = found.figures
        self.window.add_seconds(evaluation_seconds=time.monotonic() - began_at)
        if self.metrics:
            self.metrics.write("eval", step, {**figures, "tables": found.tables})
        best = self.small.see_evaluation(step, figures)
        self.console.evaluated(step, figures, time.monotonic() - began_at, best=best is not None)
        return best

    def _save(self, best: dict[str, Any] | None) -> None:
        """Snapshot now; the rest happens in the writer's thread."""
        step = self.progress.step
        if self.saved_step == step:
            return
        self.watch.enter("checkpoint", step)
        began = time.perf_counter()
        progress = with_state(self.progress, self.parts, self.small)
        self.writer.start(progress, lambda: own_fragments(self.engine), mark_best=best)
        self.saves.saved()
        self.saved_step = step
        self.window.add_seconds(checkpoint_seconds=time.perf_counter() - began)

    def _tell_saves(self) -> None:
        for saved in self.writer.take_published():
            name = step_name(saved.step)
            self._event("saved", {"saved": name, "saved_step": saved.step, "save_seconds": saved.seconds})
            self.console.saved(self.progress.step, name, saved.num_bytes, saved.seconds)

    def _roll_back(self) -> None:
        self.watch.enter("checkpoint", self.progress.step)
        self.writer.finish()
        self._tell_saves()
        bad_step = self.progress.step
        self.progress = roll_back(self.parts, self.store, self.run_id, self.small, self.progress, self.copies)
        self.spoilt, self.saved_step, self.window = False, self.progress.step, Window()
        if self.metrics:
            self.metrics.close()
            self.metrics = MetricsLog(self.run_dir.metrics, self.run_dir.tensorboard, resumed_step=self.progress.step)
        self._event("rolled_back", {"bad_step": bad_step, "position": self.progress.position})

    def _event(self, name: str, values: dict[str, Any], step: int | None = None) -> None:
        """`step`: where it was not the last one."""
        if self.metrics and not self.attempt.lost:
            self.metrics.write("event", self.progress.step if step is None else step, {"event": name, **values})

    def _fault(self, point: str, step: int) -> str:
        return fault_point(point, rank=self.ranks.rank, step=step, attempt=self.attempt.number)
