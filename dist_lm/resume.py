"""Where a run goes on, and how its state gets into and out of a checkpoint.

Enters: the newest checkpoint that verifies, and the rollbacks that earlier attempts decided.
Leaves: an engine and small states that stand where the run stood.
Promises: what was skipped once is skipped again, so that a resumed run sees the data that the
uninterrupted one saw.  All functions here are collective calls of all ranks.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_lm.assemble import Parts
from dist_lm.checkpoint import commit
from dist_lm.checkpoint.fragments import loss_scale, optimizer_scalars, restore, restore_loss_scale
from dist_lm.checkpoint.manifest import Checkpoint, Progress
from dist_lm.checkpoint.nearest import LocalCopies
from dist_lm.checkpoint.reader import Reader
from dist_lm.checkpoint.store import Store
from dist_lm.data.damage import DamagedData, extend, new_damage
from dist_lm.disk import disk_errors
from dist_lm.errors import DataError, DistLMError, Diverged
from dist_lm.guard import DivergenceGuard
from dist_lm.run_dir import ROLLBACKS, SET_ASIDE
from dist_lm.selection import Selection

log = logging.getLogger(__name__)


class SmallState:
    """What a run remembers besides tensors and its position."""

    def __init__(self, parts: Parts) -> None:
        run = parts.config.run
        self._engine = parts.engine
        self.guard = DivergenceGuard(bad_steps=run.bad_steps, spike_mads=run.spike_mads)
        self.best = Selection(run.best, key="run.best") if run.best else None
        self.early_stop = Selection(run.early_stop, key="run.early_stop") if run.early_stop else None

    def see_evaluation(self, step: int, figures: dict[str, float]) -> dict[str, Any] | None:
        """Let both selections see the figures; the entry for BEST.json where they are the best so far."""
        if self.early_stop:
            self.early_stop.see(figures)
        if self.best and self.best.see(figures):
            return {"step": step, "metric": self.best.metric, "value": self.best.best}
        return None

    def dump(self) -> dict[str, Any]:
        """JSON values for Progress.state."""
        return {
            "guard": self.guard.state(),
            "best": self.best.state() if self.best else {},
            "early_stop": self.early_stop.state() if self.early_stop else {},
            "loss_scale": loss_scale(self._engine),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.guard.restore(state.get("guard", {}))
        if self.best:
            self.best.restore(state.get("best", {}))
        if self.early_stop:
            self.early_stop.restore(state.get("early_stop", {}))
        restore_loss_scale(self._engine, state.get("loss_scale", {}))


def stamp(parts: Parts, progress: Progress, **changes: Any) -> Progress:
    """The progress with who trains now."""
    now = {
        "world_size": parts.ranks.world_size,
        "zero_stage": parts.engine.stage,
        "precision": parts.config.precision,
    }
    return Progress(**{**asdict(progress), **now, **changes})


def with_state(progress: Progress, parts: Parts, small: SmallState) -> Progress:
    """The progress as a checkpoint holds it."""
    return stamp(parts, progress, optimizer=optimizer_scalars(parts.engine), state=small.dump())


def resume(parts: Parts, store: Store, run_id: str, small: SmallState, copies: LocalCopies | None = None) -> Progress:
    """Where the run folder stands.  Raises DataError where nothing of what it saved can be used."""
    ranks = parts.ranks
    ranks.agree(lambda: _open(store))
    fresh = Progress(step=0, position=0, data_fingerprint=parts.data.fingerprint())
    began_at = time.monotonic()
    checkpoint = commit.newest_verified(store, ranks, run_id, copies=copies, tell_bad=_record_bad(parts))
    if checkpoint is None:
        return stamp(parts, _after_rollbacks(parts, fresh))
    if checkpoint.progress.data_fingerprint != parts.data.fingerprint(checkpoint.progress.position):
        raise DataError(
            "the checkpoint's position counts rows of another data set or order",
            where=checkpoint.folder,
            do="Use the data, weights, data.lanes, data.era and run.seed that the run was begun with.",
        )
    load(parts, checkpoint, small)
    if ranks.is_first:
        log.info(
            "resume  step %d from %s, verified %d files%s (%.1f s)",
            checkpoint.progress.step,
            checkpoint.name,
            len(checkpoint.files),
            f", {len(checkpoint.near)} of them here" if checkpoint.near else "",
            time.monotonic() - began_at,
        )
    return stamp(parts, _after_rollbacks(parts, checkpoint.progress))


def _record_bad(parts: Parts) -> Callable[[str, str], None]:
    """Keeps in the run folder which checkpoint was set aside, and why: for `status` and `report`."""

    def record(name: str, problem: str) -> None:
        facts = {"step": commit.step_of(name), "name": name, "problem": problem, "time": time.time()}
        parts.run_dir.append(SET_ASIDE, facts)

    return record


def _open(store: Store) -> None:
    """Sweep, and learn by it whether the place can be reached at all."""
    with disk_errors(Path(store.location), f"use {store.location} for checkpoints"):
        store.sweep()


def load(parts: Parts, checkpoint: Checkpoint, small: SmallState) -> None:
    """Fill the live engine and the small states from a checkpoint."""
    reader = Reader(checkpoint)
    reader.expect(parts.shapes)
    restore(parts.engine, reader, checkpoint.progress.optimizer)
    small.restore(checkpoint.progress.state)


def roll_back(
    parts: Parts, store: Store, run_id: str, small: SmallState, progress: Progress, copies: LocalCopies | None = None
) -> Progress:
    """Go back to the last checkpoint from before the first bad step, and skip the data since then.

    Raises Diverged where there is none, or where the run went back often enough.
    """
    run_dir, ranks, limit = parts.run_dir, parts.ranks, parts.config.run.max_rollbacks
    first_bad = progress.step - small.guard.bad_in_row + 1
    told = f"{small.guard.bad_in_row} bad steps in a row since step {first_bad}"
    done = ranks.agree(lambda: len(run_dir.read_list(ROLLBACKS)))
    if done >= limit:
        raise Diverged(
            told,
            where=str(run_dir.path),
            why=f"The run went back to a checkpoint {done} times already (run.max_rollbacks {limit}).",
            do="Lower optim.lr, lengthen optim.schedule.warmup_steps, or use precision=fp32.",
        )
    checkpoint = commit.newest_verified(
        store, ranks, run_id, before_step=first_bad, copies=copies, tell_bad=_record_bad(parts)
    )
    if checkpoint is None:
        raise Diverged(
            told,
            where=str(run_dir.path),
            why="There is no checkpoint from before the first of them.",
            do="Lower optim.lr, lengthen optim.schedule.warmup_steps, or use precision=fp32.",
        )
    back = checkpoint.progress
    record = {"from_step": back.step, "begin": back.position, "end": progress.position, "why": told}
    # On disk before anything is done about it: an attempt that dies here repeats it.
    ranks.agree(lambda: run_dir.append(ROLLBACKS, record))
    # What was saved since then must not be resumed from.
    ranks.agree(lambda: _set_aside_from(store, first_bad))
    load(parts, checkpoint, small)
    small.guard.bad_in_row = 0
    if ranks.is_first:
        log.warning(
            "%s: going back to step %d and skipping rows %d to %d", told, back.step, back.position, progress.position
        )
    return stamp(parts, _after_rollbacks(parts, back))


def set_damage_aside(
    parts: Parts, progress: Progress, failure: DistLMError | None
) -> tuple[Progress, list[DamagedData]]:
    """The progress with what the ranks found damaged in quarantine, and what that is.

    `failure` is why this rank has no rows.  Raises on every rank where one of them failed by anything
    else, where data.on_damage says so, or where there is too much damage.
    """
    data, ranks = parts.config.data, parts.ranks
    found = new_damage(ranks.gather(failure), progress.quarantine)
    if data.on_damage == "fail" or not found:
        ranks.raise_together(failure)
    quarantine = extend(progress.quarantine, found, limit=data.max_quarantine)
    if ranks.is_first:
        for damage in found:
            log.warning("damaged: %s; the next whole block stands for it (data.on_damage)", damage.where)
    return stamp(parts, progress, quarantine=quarantine), found


def _set_aside_from(store: Store, step: int) -> None:
    for name in store.names():
        if commit.step_of(name) >= step:
            store.set_aside(name, "it is from after the first bad step")


def _after_rollbacks(parts: Parts, progress: Progress) -> Progress:
    """The position after the ranges that were skipped from this very place."""
    position = progress.position
    for record in parts.ranks.agree(lambda: parts.run_dir.read_list(ROLLBACKS)):
        if record["from_step"] == progress.step and record["begin"] == position:
            position = int(record["end"])
    fingerprint = parts.data.fingerprint(position)
    return Progress(**{**asdict(progress), "position": position, "data_fingerprint": fingerprint})
