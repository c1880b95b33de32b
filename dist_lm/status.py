"""How a run is: attempts, faults, lost steps, goodput, its last checkpoint.

Enters: a run folder.  Leaves: facts, and lines for a person.  Promises: nothing is changed, and no
run is disturbed: only files are read.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from dataclasses import asdict, dataclass
from typing import Any

from dist_lm import lease
from dist_lm.checkpoint import commit
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.store import open_store
from dist_lm.duration import spoken
from dist_lm.errors import ConfigError, DataError
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import ROLLBACKS, SET_ASIDE, RunDir

_NO_FAULTS = ("done", "stopped")


@dataclass(frozen=True)
class Status:
    """Facts of a run at this moment."""

    run: str
    state: str
    """running, or how the last attempt ended."""
    step: int
    """Last step that was reached."""
    steps: int
    attempts: list[dict[str, Any]]
    faults: int
    lost_steps: int
    """Steps that had to be trained again."""
    skipped_steps: int
    rollbacks: int
    goodput: float
    """Share of the time since the first start that went into steps which counted."""
    checkpoint: dict[str, Any] | None
    """step, age_s, bytes and verification of the newest one."""
    best: dict[str, Any] | None
    set_aside: list[dict[str, Any]]
    """Damaged checkpoints that were not resumed from: name, step, problem, time."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        lines = [
            f"run         {self.run}: {self.state}, step {self.step} of {self.steps}",
            f"attempts    {len(self.attempts)}, faults {self.faults}, lost steps {self.lost_steps}, "
            f"skipped steps {self.skipped_steps}, rollbacks {self.rollbacks}",
            f"goodput     {self.goodput:.1%}",
        ]
        if self.checkpoint:
            point = self.checkpoint
            lines.append(
                f"checkpoint  step {point['step']}, {spoken(point['age_s'])} old, "
                f"{point['bytes'] / 1e6:.1f} MB, {point['verification']}"
            )
        else:
            lines.append("checkpoint  none yet")
        if self.best:
            lines.append(f"best        step {self.best['step']}: {self.best['metric']} {self.best['value']:.4f}")
        lines += [f"set aside   {bad['name']}: {bad['problem']}" for bad in self.set_aside]
        for facts in self.attempts[-8:]:
            lines.append(
                f"  attempt {facts['attempt']} by {facts.get('launcher')} on {facts.get('world_size')} ranks: "
                f"{facts.get('reason', 'running')} at step {facts.get('step', 0)}"
                + (f" ({facts['what']})" if facts.get("what") else "")
            )
        return lines


def status_of(run_dir: RunDir, *, now: float | None = None, verify: bool = True) -> Status:
    """Raises ConfigError where the folder is no run folder.  `verify`: read every byte of the newest checkpoint."""
    if not run_dir.identity.exists():
        raise ConfigError(f"{run_dir.path} is not a run folder", do="Name a folder that `dist-lm train` wrote.")
    now = time.time() if now is None else now
    attempts = [run_dir.attempt_facts(number) for number in range(1, run_dir.next_attempt())]
    held = lease.read(run_dir.leases)
    running = is_running(run_dir)
    if attempts and "ended_at" not in attempts[-1]:
        mine = held if held.get("attempt") == attempts[-1]["attempt"] else {}
        seen = {"step": mine.get("step", 0), "useful_s": mine.get("useful_s", 0.0)}
        attempts[-1] |= seen if running else {**seen, "reason": "died", "ended_at": mine.get("at", now)}
    events = read_metrics(run_dir.metrics, "event")
    step = max((facts.get("step", 0) for facts in attempts), default=0)
    state = "running" if running else str(attempts[-1].get("reason")) if attempts else "not started"
    return Status(
        run=str(run_dir.path),
        state=state,
        step=step,
        steps=int(_identity(run_dir).get("run.steps", 0)),
        attempts=attempts,
        faults=sum(facts.get("reason", "done") not in _NO_FAULTS for facts in attempts),
        lost_steps=_lost_steps(attempts),
        skipped_steps=sum(event.get("event") == "step_skipped" for event in events),
        rollbacks=len(run_dir.read_list(ROLLBACKS)),
        goodput=_goodput(attempts, now if running else attempts[-1]["ended_at"] if attempts else now),
        checkpoint=_newest(run_dir, now, verify),
        best=commit.best(open_store(run_dir.checkpoint_location())),
        set_aside=run_dir.read_list(SET_ASIDE),
    )


def is_running(run_dir: RunDir) -> bool:
    """Whether somebody holds the lease and is alive, as far as this host can tell."""
    held = lease.read(run_dir.leases)
    if not held or held.get("released"):
        return False
    if held["host"] != platform.node():
        return time.time() - float(held["at"]) < 5 * lease.TTL_S
    try:
        os.kill(int(held["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _identity(run_dir: RunDir) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run_dir.identity.read_text())
    return found


def _lost_steps(attempts: list[dict[str, Any]]) -> int:
    """What each attempt reached beyond the step that the next one began at."""
    lost = 0
    for before, after in itertools.pairwise(attempts):
        if "from_step" in after:
            lost += max(0, int(before.get("step", 0)) - int(after["from_step"]))
    return lost


def _goodput(attempts: list[dict[str, Any]], until: float) -> float:
    if not attempts:
        return 0.0
    useful_s = 0.0
    for number, facts in enumerate(attempts):
        trained = int(facts.get("step", 0)) - int(facts.get("from_step", 0))
        later = attempts[number + 1].get("from_step") if number + 1 < len(attempts) else None
        kept = trained if later is None else min(trained, int(later) - int(facts.get("from_step", 0)))
        useful_s += float(facts.get("useful_s", 0.0)) * max(0, kept) / trained if trained > 0 else 0.0
    elapsed_s = until - float(attempts[0]["began_at"])
    return min(1.0, useful_s / elapsed_s) if elapsed_s > 0 else 0.0


def _newest(run_dir: RunDir, now: float, verify: bool) -> dict[str, Any] | None:
    store = open_store(run_dir.checkpoint_location())
    names = store.names()
    if not names:
        return None
    try:
        checkpoint = Checkpoint.read(store, names[0])
        damage = checkpoint.damage(sorted(checkpoint.files)) if verify else "not verified now"
    except DataError as error:
        return {"step": commit.step_of(names[0]), "age_s": 0.0, "bytes": 0, "verification": error.what}
    return {
        "step": checkpoint.progress.step,
        "age_s": max(0.0, now - checkpoint.saved_at),
        "bytes": checkpoint.num_bytes,
        "verification": damage or "verified",
    }
