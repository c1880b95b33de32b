"""What a report tells of a run.

Enters: a run folder.  Leaves: RunFacts.  Promises: only files are read; a figure that is not finite
is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import yaml

from dist_lm.config import RunConfig
from dist_lm.config_keys import flatten
from dist_lm.metrics import read_metrics
from dist_lm.report.planned import PlannedMemory
from dist_lm.run_dir import RunDir
from dist_lm.status import Status, status_of

Points = list[tuple[float, float]]
SECONDS = {
    "data_seconds": "waiting for data",
    "peer_seconds": "waiting for other ranks",
    "forward_seconds": "forward",
    "backward_seconds": "backward",
    "optimizer_seconds": "optimizer",
    "evaluation_seconds": "evaluation",
    "checkpoint_seconds": "checkpoints",
}
"""Parts of a step, per step and rank; what is left of step_seconds is the rest.  A record has the last
two only where something was evaluated or saved since the record before it."""
_NO_FAULTS = ("done", "stopped", "running")
_EXPECTED = ("saved",)
"""Events that are part of every run: they are counted and not marked."""


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
    origins: dict[str, str] = field(default_factory=dict)
    """Key of the configuration -> file and line, override, or default."""
    planned: PlannedMemory | None = None

    def origin(self, key: str) -> str:
        """Where the value of a key comes from: a recipe, a file, the command line, or the default."""
        found = self.origins.get(key, "")
        if found.startswith("override "):
            return f"command line: {found.removeprefix('override ').strip('`')}"
        shipped = re.search(r"dist_lm/recipes/files/recipes/([\w.-]+)\.yaml(?::(\d+))?$", found)
        return f"recipe {shipped[1]}, line {shipped[2]}" if shipped and shipped[2] else found

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
    marks += [_mark(event) for event in events if event.get("event") not in _EXPECTED]
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
        _origins(run_dir),
    )


def _mark(event: dict[str, Any]) -> tuple[float, str]:
    """Step and words of an event, of whatever kind."""
    name, step = str(event.get("event")), event["step"]
    if name == "step_skipped":
        return float(step), f"step {step} skipped"
    if name == "rolled_back":
        return float(event["bad_step"]), f"rolled back from step {event['bad_step']} to {step}"
    facts = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("kind", "step", "time", "event"))
    return float(step), f"{name.replace('_', ' ')} at step {step}" + (f": {facts}" if facts else "")


def _origins(run_dir: RunDir) -> dict[str, str]:
    found: dict[str, str] = json.loads(run_dir.origins.read_text()) if run_dir.origins.is_file() else {}
    return found


def _config(run_dir: RunDir) -> dict[str, Any]:
    if not run_dir.config.is_file():
        return {}
    return flatten(RunConfig.model_validate(yaml.safe_load(run_dir.config.read_text())))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
