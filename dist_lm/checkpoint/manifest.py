"""What a published checkpoint says about itself.

Enters: manifest.json in a store.  Leaves: a Checkpoint: progress, files with hashes, and which range
of which parameter lies where.
Promises: a manifest that is missing, torn, changed in one bit or from a newer version is a DataError,
never a guess.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dist_lm.checkpoint.store import LocalStore, Store
from dist_lm.data.damage import Place
from dist_lm.errors import DataError

FORMAT, VERSION = "dist_lm-checkpoint", 1
MANIFEST = "manifest.json"
_SEAL = "sha256"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, besides its tensors."""

    step: int
    """Steps done: optimizer updates, and steps that were skipped for a gradient that is not finite."""
    position: int
    """Rows passed: the data order's one integer of state."""
    data_fingerprint: str
    """What the position counts in."""
    tokens: int = 0
    """Non-padding tokens trained on, over all ranks."""
    world_size: int = 1
    zero_stage: int = 0
    precision: str = "fp32"
    optimizer: dict[str, float] = field(default_factory=dict)
    """What the optimizer counts for all parameters alike, such as its step."""
    quarantine: list[Place] = field(default_factory=list)
    """Damaged places of the data that others stand for: sorted."""
    state: dict[str, Any] = field(default_factory=dict)
    """Small states by name, as JSON values: loss scale, early stopping, the divergence guard."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    store: Store
    name: str
    run_id: str
    saved_at: float
    """Wall-clock time of the publication; for people, nothing depends on it."""
    progress: Progress
    files: dict[str, dict[str, Any]]
    """File name -> bytes and sha256."""
    parameters: dict[str, dict[str, Any]] = field(repr=False)
    """Parameter -> shape, keys, and pieces [start, size, file]."""
    near: dict[str, Path] = field(default_factory=dict, repr=False)
    """Good copies of its files on this machine; those are read instead."""
    unchecked: set[str] = field(default_factory=set, repr=False)
    """Files that nobody has verified: this happens before the first byte of one is read."""

    @property
    def folder(self) -> str:
        """Where it lies, for messages."""
        return self.store.where(self.name)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """The checkpoint in a local folder.  Raises DataError as `read` does."""
        return cls.read(LocalStore(folder.parent), folder.name)

    @classmethod
    def read(cls, store: Store, name: str) -> Checkpoint:
        """Raises DataError where the manifest is missing, damaged or from a newer version."""
        path = f"{store.where(name)}/{MANIFEST}"
        try:
            content = json.loads(store.read(name, MANIFEST))
            if content["format"] != FORMAT:
                raise DataError(f"{path} is not a checkpoint's manifest", do="Check the folder.")
            if content["version"] > VERSION:
                raise DataError(
                    f"{path} was written by a newer dist_lm (format {content['version']})",
                    do="Upgrade dist_lm.",
                )
            if content.pop(_SEAL) != _hash(content):
                raise DataError(f"{path} does not match its own SHA-256", do="Use the checkpoint before it.")
            facts = content["progress"]
            quarantine = [tuple(place) for place in facts.get("quarantine", [])]
            progress = Progress(**{**facts, "quarantine": quarantine})
            run_id, saved_at = content["run_id"], content["saved_at"]
            return cls(store, name, run_id, saved_at, progress, content["files"], content["parameters"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read", why=repr(error)) from error

    def damage(self, files: Iterable[str]) -> str:
        """What is wrong with these files; empty if nothing is."""
        for name in files:
            expected = self.files[name]
            size = self.store.size(self.name, name)
            if size is None:
                return f"{name} is missing"
            if size != expected["bytes"]:
                return f"{name} has {size} bytes instead of {expected['bytes']}"
            if self.store.sha256(self.name, name) != expected["sha256"]:
                return f"{name} does not match its SHA-256"
        return ""

    def read_range(self, file: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, or fewer where it ends.  Raises OSError, also for a damaged file."""
        if file in self.near:
            with self.near[file].open("rb") as content:
                content.seek(start)
                return content.read(end - start)
        if file in self.unchecked:
            if problem := self.damage([file]):
                raise OSError(problem)
            self.unchecked.discard(file)
        return self.store.read_range(self.name, file, start, end)

    @property
    def num_bytes(self) -> int:
        return sum(int(facts["bytes"]) for facts in self.files.values())


def manifest_bytes(progress: Progress, run_id: str, reports: Iterable[dict[str, Any]]) -> bytes:
    """The manifest that says what the ranks report to have written."""
    files: dict[str, Any] = {}
    parameters: dict[str, dict[str, Any]] = {}
    for report in reports:
        files[report["file"]] = {"bytes": report["bytes"], "sha256": report["sha256"]}
        for name, piece in report["pieces"].items():
            parameter = parameters.setdefault(name, {"shape": piece["shape"], "keys": piece["keys"], "pieces": []})
            parameter["pieces"].append([piece["start"], piece["size"], report["file"]])
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "run_id": run_id,
        "saved_at": time.time(),
        "progress": asdict(progress),
        "files": files,
        "parameters": parameters,
    }
    return sealed(manifest)


def sealed(manifest: dict[str, Any]) -> bytes:
    """The file's content: the manifest with its own hash."""
    content = {name: value for name, value in manifest.items() if name != _SEAL}
    return (json.dumps({**content, _SEAL: _hash(content)}, indent=1, sort_keys=True) + "\n").encode()


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
