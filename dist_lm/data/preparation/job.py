"""What every task of one preparation knows, and where its files lie.

Enters: the user's options, resolved.  Leaves: a folder that any process of any machine can work from:

    OUT/.work-<identity>/job-<hash>.json
                         tokenizer/    a copy: other machines need no other folder
                         map/          documents of each split of the input, by bucket
                         parts-<hash>.json   the files in map/
                         reduce/       what each bucket became
    OUT/train, OUT/heldout             shards as they are made; the manifest comes last

Promises: the job decides every byte of the result; who works on it, and how often it was killed, does not.
"""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from dist_lm.data.kinds.base import Kind, PackingRules
from dist_lm.data.kinds.registry import kind_named
from dist_lm.data.sources.format import ReadSettings, Split
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.vocabulary import CONFIG_FILE, TEMPLATE_FILE, TOKENIZER_FILE
from dist_lm.disk import disk_errors, sync_folder, write_bytes
from dist_lm.errors import EnvironmentFault

TRAIN, HELDOUT = "train", "heldout"
_TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Job:
    """A preparation, resolved."""

    kind_name: str
    rules: PackingRules
    settings: ReadSettings
    filters: Mapping[str, float]
    seed: int
    heldout_fraction: float
    num_buckets: tuple[int, int]
    """Of the training set, and of the held-out set behind it."""
    block_rows: int
    shard_rows: int
    """Most rows of a shard."""
    max_bad: int
    part_bytes: int
    """What a map task holds before it writes."""
    splits: tuple[Split, ...]

    @property
    def kind(self) -> Kind:
        return kind_named(self.kind_name)

    @property
    def names(self) -> list[str]:
        """The data sets to make."""
        return [TRAIN, HELDOUT] if self.num_buckets[1] else [TRAIN]

    def name_of(self, bucket: int) -> str:
        return TRAIN if bucket < self.num_buckets[0] else HELDOUT


_ADAPTER: TypeAdapter[Job] = TypeAdapter(Job)


@dataclass(frozen=True)
class PartOfMap:
    """A file that the map phase has left."""

    name: str
    label_places: list[int]
    """Place in the list of all labels of each label that this file numbers."""


@dataclass(frozen=True)
class PartsOfMap:
    """All of them, in the order of the input."""

    parts: list[PartOfMap]


@dataclass(frozen=True)
class WorkFolder:
    """The folder of a job."""

    path: Path

    @property
    def out(self) -> Path:
        return self.path.parent

    @property
    def map(self) -> Path:
        return self.path / "map"

    @property
    def reduce(self) -> Path:
        return self.path / "reduce"

    def write(self, job: Job, tokenizer: Path) -> Path:
        """Everything that tasks need; returns the file of the job, which is written last."""
        with disk_errors(self.path):
            for folder in (self.map, self.reduce, self.path / _TOKENIZER):
                folder.mkdir(parents=True, exist_ok=True)
            for name in (TOKENIZER_FILE, CONFIG_FILE, TEMPLATE_FILE):
                if (tokenizer / name).exists():
                    write_bytes(self.path / _TOKENIZER / name, (tokenizer / name).read_bytes())
            sync_folder(self.out)
        return self._write("job", json_of(job))

    def write_parts(self, parts: list[PartOfMap]) -> Path:
        """What the reduce phase reads; returns its file."""
        return self._write("parts", json_of(PartsOfMap(parts)))

    def _write(self, name: str, content: bytes) -> Path:
        # The hash in the name lets a process remember what it has read, also when it serves several runs.
        path = self.path / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}.json"
        write_bytes(path, content)
        return path

    def remove(self) -> None:
        with disk_errors(self.path, "remove a work folder"):
            shutil.rmtree(self.path)


@lru_cache(maxsize=2)
def load_job(path: Path) -> Job:
    """The job of this file.  EnvironmentFault where this machine does not see it."""
    return _ADAPTER.validate_json(_read(path))


@lru_cache(maxsize=2)
def load_parts(path: Path) -> PartsOfMap:
    """What the map phase has left."""
    return TypeAdapter(PartsOfMap).validate_json(_read(path))


@lru_cache(maxsize=2)
def load_job_tokenizer(job_path: Path) -> Tokenizer:
    return load_tokenizer(job_path.parent / _TOKENIZER)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EnvironmentFault(
            "a task cannot see the folder of its preparation",
            where=f"{socket.gethostname()}: {path}",
            why=str(error),
            do="With --ray, --out must lie on storage that every node reaches under the same path.",
        ) from error


def json_of(value: Any) -> bytes:
    """A dataclass as JSON."""
    return TypeAdapter(type(value)).dump_json(value)
