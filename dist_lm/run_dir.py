"""Layout of a run folder, its identity and its attempts.

    config.yaml  origins.json  identity.json  ds_config.json  env.json      what the run is
    model/                                          Hugging Face config and tokenizer, for export
    attempts/0001.json ...                          who ran it, from which step, how it ended
    checkpoints/step-00000100/ ...
    metrics.jsonl  tb/                              what it measured
    logs/  errors/  heartbeats/
    leases/0001.json  run_id                        which attempt may write; whose checkpoints these are
    rollbacks.json  too-large/                      what later attempts must know
    set_aside.json                                  damaged checkpoints, and what was wrong

Enters: a folder name.  Leaves: the paths in it.  Promises: one folder is one run; another
configuration is refused before anything is touched.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_lm import disk
from dist_lm.errors import ConfigError, EnvironmentFault

ROLLBACKS = "rollbacks"
SET_ASIDE = "set_aside"
"""Lists of RunDir.read_list: what the run went back over, and damaged checkpoints."""


@dataclass(frozen=True)
class RunDir:
    """Paths of one run; nothing is created before `begin`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tb"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def errors(self) -> Path:
        return self.path / "errors"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def origins(self) -> Path:
        """Where each value of the configuration came from."""
        return self.path / "origins.json"

    @property
    def attempts(self) -> Path:
        return self.path / "attempts"

    @property
    def identity(self) -> Path:
        return self.path / "identity.json"

    @property
    def heartbeats(self) -> Path:
        return self.path / "heartbeats"

    @property
    def leases(self) -> Path:
        return self.path / "leases"

    @property
    def stop_file(self) -> Path:
        """There while somebody asks the run to stop."""
        return self.path / "stop"

    @property
    def peer_stop_file(self) -> Path:
        """There while a rank tells the others that it was asked to stop."""
        return self.path / "stop-peers"

    @property
    def regroup_file(self) -> Path:
        """There while a group of workers is asked to make way for a larger one."""
        return self.path / "regroup"

    def forget_stops(self) -> None:
        """Nobody asks this group to stop any more."""
        for path in (self.stop_file, self.peer_stop_file, self.regroup_file):
            path.unlink(missing_ok=True)

    def checkpoint_location(self) -> str:
        """Where the run's checkpoints lie: run.checkpoints, or a folder of the run."""
        if self.config.is_file():
            elsewhere = yaml.safe_load(self.config.read_text())["run"].get("checkpoints")
            if elsewhere:
                return str(elsewhere)
        return str(self.checkpoints)

    def run_id(self) -> str:
        """What tells this run's checkpoints from those of another; made at the first call."""
        path = self.path / "run_id"
        if not path.exists():
            disk.write_bytes(path, uuid.uuid4().hex.encode())
        return path.read_text()

    def mark_too_large(self, micro_rows: int) -> None:
        """Remember a micro-batch that did not fit into memory.  Several ranks may do it at once."""
        folder = self.path / "too-large"
        with disk.disk_errors(folder):
            folder.mkdir(exist_ok=True)
            (folder / str(micro_rows)).touch()

    def too_large(self) -> list[int]:
        """Micro-batches that did not fit, in rows, the smallest first."""
        return sorted(int(path.name) for path in (self.path / "too-large").glob("*"))

    def read_list(self, name: str) -> list[dict[str, Any]]:
        """A small list of facts that outlives attempts, such as the rollbacks."""
        path = self.path / f"{name}.json"
        found: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
        return found

    def append(self, name: str, facts: dict[str, Any]) -> None:
        """Add to the list of `read_list`."""
        disk.write_json(self.path / f"{name}.json", [*self.read_list(name), facts])

    def begin(self) -> None:
        """Create the folders.  Raises ConfigError where a file is in the way."""
        with disk.disk_errors(self.path):
            try:
                for folder in (self.checkpoints, self.attempts, self.logs, self.errors, self.model):
                    folder.mkdir(parents=True, exist_ok=True)
            except (FileExistsError, NotADirectoryError) as error:
                raise ConfigError(
                    f"{self.path} cannot be a run folder",
                    where="run.dir",
                    why=f"{error.filename} is a file.",
                    do="Choose another folder.",
                ) from error

    def claim(self, identity: dict[str, Any], differences: Callable[[dict[str, Any]], list[str]]) -> None:
        """Make the folder this run's own, or refuse a run that it does not belong to.

        `differences(stored identity)` names what differs and is not allowed to.
        """
        if self.identity.exists():
            stored = json.loads(self.identity.read_text())
            changed = differences(stored)
            if changed:
                shown = "\n".join(changed[:4])
                more = f"\n... and {len(changed) - 4} more" if len(changed) > 4 else ""
                raise ConfigError(
                    f"{self.path} belongs to a run with another configuration",
                    where="run.dir",
                    why=shown + more,
                    do="Choose another run.dir, or name the keys in run.allow_change.",
                )
        elif (self.path.exists() and not self.path.is_dir()) or self._has_strangers():
            raise ConfigError(
                f"{self.path} is not empty and is not a run folder",
                where="run.dir",
                do="Choose another folder, or empty this one.",
            )
        self.begin()
        disk.write_json(self.identity, identity)

    def _has_strangers(self) -> bool:
        # The launcher may have put its logs there before the first rank came up.
        return self.path.is_dir() and any(entry.name != "logs" for entry in self.path.iterdir())

    def next_attempt(self) -> int:
        """Number of the next attempt, counted from 1."""
        return len(list(self.attempts.glob("*.json"))) + 1

    def open_attempt(self, facts: dict[str, Any]) -> int:
        """Number of the attempt that begins now; its facts are on disk."""
        attempt = self.next_attempt()
        disk.write_json(self._attempt_file(attempt), {"attempt": attempt, "began_at": time.time(), **facts})
        return attempt

    def add_to_attempt(self, attempt: int, **facts: Any) -> None:
        """Add facts to an attempt's record."""
        path = self._attempt_file(attempt)
        disk.write_json(path, {**json.loads(path.read_text()), **facts})

    def close_attempt(self, attempt: int, **facts: Any) -> None:
        """Add how the attempt ended."""
        self.add_to_attempt(attempt, **{"ended_at": time.time(), **facts})

    def attempt_facts(self, attempt: int) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads(self._attempt_file(attempt).read_text())
        return facts

    def _attempt_file(self, attempt: int) -> Path:
        return self.attempts / f"{attempt:04d}.json"

    def write_error(self, attempt: int, rank: int, traceback: str) -> Path:
        """Keep a traceback for people who debug; the console shows the message only."""
        path = self.errors / f"attempt-{attempt:04d}-rank-{rank:05d}.txt"
        self.errors.mkdir(parents=True, exist_ok=True)
        path.write_text(traceback)
        return path


def check_space(path: Path, needed_bytes: int) -> None:
    """Raise EnvironmentFault unless `needed_bytes` are free where `path` lies."""
    stat = os.statvfs(path)
    free = stat.f_bavail * stat.f_frsize
    if free < needed_bytes:
        raise EnvironmentFault(
            f"{path} has {free / 2**20:.0f} MiB free, a checkpoint needs {needed_bytes / 2**20:.0f} MiB",
            do="Free some space, or choose a run.dir on a larger disk.",
        )
