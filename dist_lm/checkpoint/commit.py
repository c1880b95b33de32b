"""A checkpoint exists or it does not: write, verify, publish, prune.

Enters: the fragments of every rank and the run's progress.  Leaves: `step-NNNNNNNN/` with one
safetensors file a rank and manifest.json.
Promises: a folder of that name is complete; a damaged one is found by its hashes, set aside under a
name that says so, and the one before it is taken; the only verified one is never removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from dist_lm import disk
from dist_lm.checkpoint.fragments import WEIGHT, Fragment
from dist_lm.errors import DataError
from dist_lm.faults import fault_point
from dist_lm.ranks import Ranks

log = logging.getLogger(__name__)

FORMAT, VERSION = "dist_lm-checkpoint", 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Progress:
    """Where a run stands, besides its tensors."""

    step: int
    """Optimizer updates done."""
    position: int
    """Rows trained on: the data order's one integer of state."""
    data_fingerprint: str
    """What the position counts in."""
    tokens: int = 0
    """Non-padding tokens trained on, over all ranks."""
    world_size: int = 1
    zero_stage: int = 0
    precision: str = "fp32"


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint."""

    folder: Path
    progress: Progress
    files: dict[str, dict[str, Any]]
    """File name -> bytes and sha256."""
    parameters: dict[str, dict[str, Any]] = field(repr=False)
    """Parameter -> shape, keys, and pieces [start, size, file]."""

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Raises DataError where the manifest is missing, damaged or from a newer version."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_bytes())
            if content["format"] != FORMAT:
                raise DataError(f"{path} is not a checkpoint's manifest", do="Check the folder.")
            if content["version"] > VERSION:
                raise DataError(
                    f"{path} was written by a newer dist_lm (format {content['version']})",
                    do="Upgrade dist_lm.",
                )
            return cls(folder, Progress(**content["progress"]), content["files"], content["parameters"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read", why=repr(error)) from error

    def damage(self, files: list[str]) -> str:
        """What is wrong with these files; empty if nothing is."""
        for name in files:
            path, expected = self.folder / name, self.files[name]
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != expected["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
            if disk.sha256_of(path) != expected["sha256"]:
                return f"{name} does not match its SHA-256"
        return ""


def save(
    root: Path,
    progress: Progress,
    fragments: Iterator[Fragment],
    ranks: Ranks,
    *,
    attempt: int,
    keep: int,
) -> Path:
    """Publish this step's checkpoint; a collective call.  Returns its folder.

    An error of any rank is raised on all of them, and nothing is published.
    """
    target = root / f"step-{progress.step:08d}"
    hidden = root / f".tmp-{target.name}"
    reached = _Places(ranks.rank, progress.step, attempt)
    reached("before_save")
    ranks.agree(lambda: _begin(hidden))
    entry: dict[str, Any] = {}
    failure: Exception | None = None
    try:
        entry = _write_own(hidden, ranks.rank, fragments)
    except Exception as error:
        failure = error
    reached("after_write")
    entries = ranks.gather(entry)
    try:
        ranks.raise_together(failure)
        ranks.agree(lambda: _publish(hidden, target, progress, entries, reached))
    except Exception:
        if ranks.is_first:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    ranks.agree(lambda: prune(root, keep))
    return target


class _Places:
    """Fault points of one save."""

    def __init__(self, rank: int, step: int, attempt: int) -> None:
        self._rank, self._step, self._attempt = rank, step, attempt

    def __call__(self, point: str) -> None:
        fault_point(point, rank=self._rank, step=self._step, attempt=self._attempt)


def _begin(hidden: Path) -> None:
    # A hidden folder is what an attempt that died left behind: nobody else writes to this run.
    with disk.disk_errors(hidden):
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir(parents=True)


def _write_own(hidden: Path, rank: int, fragments: Iterator[Fragment]) -> dict[str, Any]:
    name = f"rank-{rank:05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Any]] = {}
    for fragment in fragments:
        for key, value in fragment.tensors.items():
            tensors[f"{fragment.name}|{key}"] = value.detach().to("cpu", torch.float32, copy=True).contiguous()
        pieces[fragment.name] = {
            "shape": fragment.shape,
            "keys": sorted(fragment.tensors),
            "piece": [fragment.start, fragment.size, name],
        }
    content = to_safetensors(tensors)
    disk.write_bytes(hidden / name, content)
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return {"name": name, "facts": facts, "pieces": pieces}


def _publish(
    hidden: Path,
    target: Path,
    progress: Progress,
    entries: list[dict[str, Any]],
    reached: Callable[[str], None],
) -> None:
    parameters: dict[str, dict[str, Any]] = {}
    for entry in entries:
        for name, piece in entry["pieces"].items():
            parameter = parameters.setdefault(name, {"shape": piece["shape"], "keys": piece["keys"], "pieces": []})
            parameter["pieces"].append(piece["piece"])
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "progress": asdict(progress),
        "files": {entry["name"]: entry["facts"] for entry in entries},
        "parameters": parameters,
    }
    disk.write_json(hidden / MANIFEST, manifest)
    reached("before_publish")
    if target.exists():
        set_aside(target, "it is saved again")
    with disk.disk_errors(target):
        os.rename(hidden, target)
        disk.sync_folder(target.parent)
    reached("after_publish")


def published(root: Path) -> list[Path]:
    """Checkpoint folders, newest first."""
    return sorted(root.glob("step-*"), reverse=True) if root.is_dir() else []


def newest_verified(root: Path, ranks: Ranks) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; a collective call.

    Each rank hashes its share of the files.  A bad checkpoint is set aside and named in the log.
    None where the run has never saved.  Raises DataError where all that it saved is damaged.
    """
    candidates = ranks.agree(lambda: published(root))
    for folder in candidates:
        checkpoint, verdict = None, ""
        try:
            checkpoint = Checkpoint.load(folder)
            verdict = checkpoint.damage(sorted(checkpoint.files)[ranks.rank :: ranks.world_size])
        except DataError as error:
            verdict = f"{error.what}: {error.why}"
        problems = [problem for problem in ranks.gather(verdict) if problem]
        if not problems:
            return checkpoint
        if ranks.is_first:
            set_aside(folder, problems[0])
    if candidates:
        raise DataError(
            f"none of the {len(candidates)} checkpoints of this run can be trusted",
            where=str(root),
            why="Each is set aside under a name that begins with .bad-.",
            do="Restore one from a copy, or start again in an empty run folder.",
        )
    return None


def set_aside(folder: Path, problem: str) -> None:
    """Keep a rejected checkpoint for inspection, under a name that no reader accepts."""
    number = 0
    while (aside := folder.with_name(f".bad-{folder.name}-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    log.warning("checkpoint %s is set aside as %s: %s", folder.name, aside.name, problem)


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; called after a newer one was published."""
    for folder in published(root)[keep:]:
        trash = folder.with_name(f".trash-{folder.name}")
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)


class Reader:
    """Ranges of parameters from the files of a checkpoint, whatever world size wrote them."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._files: dict[str, Any] = {}

    def expect(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise DataError unless the checkpoint holds exactly these parameters."""
        held = {name: tuple(facts["shape"]) for name, facts in self.checkpoint.parameters.items()}
        if held == shapes:
            return
        names = sorted(name for name in {*held, *shapes} if held.get(name) != shapes.get(name))
        first = names[0]
        raise DataError(
            f"the checkpoint is of another model: {len(names)} parameters differ",
            where=str(self.checkpoint.folder),
            why=f"{first}: saved {held.get(first, 'nothing')}, wanted {shapes.get(first, 'nothing')}",
            do="Use the configuration that the run was begun with.",
        )

    def read(self, name: str, key: str, start: int, size: int) -> Tensor:
        """fp32 tensor [size]: elements start .. start + size of the flattened parameter."""
        result = torch.empty(size, dtype=torch.float32)
        filled = 0
        for begin, length, file in self.checkpoint.parameters[name]["pieces"]:
            low, high = max(begin, start), min(begin + length, start + size)
            if low < high:
                part = self._open(file).get_slice(f"{name}|{key}")[low - begin : high - begin]
                result[low - start : high - start] = part
                filled += high - low
        if filled != size:
            raise DataError(
                f"{name}|{key}: {filled} of {size} elements are in the checkpoint",
                where=str(self.checkpoint.folder),
                do="Use the checkpoint before it.",
            )
        return result

    def weight(self, name: str) -> Tensor:
        """The whole fp32 parameter in its own shape."""
        shape = self.checkpoint.parameters[name]["shape"]
        return self.read(name, WEIGHT, 0, int(torch.Size(shape).numel())).view(shape)

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.checkpoint.folder / file, "pt")
            except (OSError, SafetensorError) as error:
                raise DataError(f"{self.checkpoint.folder / file} cannot be read", why=str(error)) from error
        return self._files[file]
