"""What a report tells of a run.

Enters: a run folder.  Leaves: RunFacts.  Promises: only files are read; a figure that is not finite
is left out.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import yaml

from dist_lm.config import RunConfig
from dist_lm.config_keys import flatten
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.status import Status, status_of

Points = list[tuple[float, float]]
SECONDS = {
    "data_seconds": "waiting for data",
    "forward_seconds": "forward",
    "backward_seconds": "backward",
    "optimizer_seconds": "optimizer",
    "evaluation_seconds": "evaluation",
    "checkpoint_seconds": "checkpoints",
}
"""Parts of a step, per step and rank; what is left of step_seconds is the rest.  A record has the last
two only where something was evaluated or saved since the record before it."""
_NO_FAULTS = ("done", "stopped", "running")


@dataclass(frozen=True)
class RunFacts:
    """One run of a report."""

    name: str
    status: Status
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    events: Counter[str]
    marks: list[tuple[float, str]]
    """Steps at which an attempt ended other than well, rollbacks, skipped steps and checkpoints that were
    set aside, with what happened."""
    config: dict[str, Any]

    def points(self, kind: str, name: str) -> Points:
        """Step and value of a figure."""
        records = self.train if kind == "train" else self.evaluations
        return [(record["step"], record[name]) for record in records if _finite(record.get(name))]

    def names(self, kind: str) -> list[str]:
        """Figures of its records, in order."""
        records = self.train if kind == "train" else self.evaluations
        found = dict.fromkeys(name for record in records for name in record if _finite(record[name]))
        return [name for name in found if name not in ("step", "time")]

    def total(self, name: str) -> float:
        """Of all records; one that lacks the figure counts as zero."""
        return sum(value for _, value in self.points("train", name))

    def where_time_went(self) -> dict[str, float]:
        """Share of the time of a step, by what it was used for."""
        step_s = self.total("step_seconds")
        if not step_s:
            return {}
        parts = {words: self.total(name) for name, words in SECONDS.items()}
        shares = {words: seconds / step_s for words, seconds in parts.items() if seconds}
        return {**shares, "other": max(0.0, 1.0 - sum(shares.values()))}


def read_run(run_dir: RunDir) -> RunFacts:
    """Raises ConfigError where the folder is no run folder."""
    status = status_of(run_dir)
    records = read_metrics(run_dir.metrics)
    events = [record for record in records if record["kind"] == "event"]
    marks = [
        (float(facts.get("step", 0)), f"attempt {facts['attempt']}: {facts['reason']} at step {facts.get('step', 0)}")
        for facts in status.attempts
        if facts.get("reason", "running") not in _NO_FAULTS
    ]
    marks += [(float(bad["step"]), f"{bad['name']} set aside: {bad['problem']}") for bad in status.set_aside]
    for event in events:
        if event.get("event") == "step_skipped":
            marks.append((float(event["step"]), f"step {event['step']} skipped"))
        elif event.get("event") == "rolled_back":
            marks.append((float(event["bad_step"]), f"rolled back from step {event['bad_step']} to {event['step']}"))
    counts = Counter(str(event.get("event")) for event in events)
    if status.set_aside:
        counts["checkpoint set aside"] = len(status.set_aside)
    return RunFacts(
        str(run_dir.path),
        status,
        [record for record in records if record["kind"] == "train"],
        [record for record in records if record["kind"] == "eval"],
        counts,
        marks,
        _config(run_dir),
    )


def _config(run_dir: RunDir) -> dict[str, Any]:
    if not run_dir.config.is_file():
        return {}
    return flatten(RunConfig.model_validate(yaml.safe_load(run_dir.config.read_text())))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
