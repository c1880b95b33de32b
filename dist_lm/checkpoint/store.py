"""Where checkpoints lie: folders of files under one root, hidden until they are published.

Enters: a root and names of checkpoints and files.  Leaves: bytes, to and from.
Promises: a name that `names` returns was published whole; what a writer that died left behind is
never read, and swept at the next start.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from dist_lm import disk

log = logging.getLogger(__name__)
CHUNK_BYTES = 1 << 22
PREFIX = "step-"
Chunks = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written.  The tag is unique: attempt and number of the save."""

    name: str
    tag: str


def step_name(step: int) -> str:
    """Name of the checkpoint after this many steps."""
    return f"{PREFIX}{step:08d}"


class Store(ABC):
    """Checkpoints under one root."""

    location: str

    def where(self, name: str) -> str:
        """Place of a checkpoint, for messages."""
        return f"{self.location}/{name}"

    @abstractmethod
    def names(self) -> list[str]:
        """Published checkpoints, newest first."""

    @abstractmethod
    def size(self, name: str, file: str) -> int | None:
        """Bytes of a file; None where it is missing."""

    @abstractmethod
    def read_range(self, name: str, file: str, start: int, end: int) -> bytes:
        """Bytes [start, end) of a file, or fewer where it ends.  Raises OSError."""

    def read(self, name: str, file: str) -> bytes:
        """A whole (small) file.  Raises OSError."""
        size = self.size(name, file)
        if size is None:
            raise FileNotFoundError(f"{self.where(name)}/{file}")
        return self.read_range(name, file, 0, size)

    def chunks(self, name: str, file: str) -> Iterator[bytes]:
        """A file in pieces.  Raises OSError."""
        start = 0
        while chunk := self.read_range(name, file, start, start + CHUNK_BYTES):
            yield chunk
            start += len(chunk)

    def sha256(self, name: str, file: str) -> str:
        """Hex SHA-256 of a file.  Raises OSError."""
        digest = hashlib.sha256()
        for chunk in self.chunks(name, file):
            digest.update(chunk)
        return digest.hexdigest()

    @abstractmethod
    def file_in(self, draft: Draft, file: str) -> str:
        """The name by which a manifest knows a file of this draft."""

    @abstractmethod
    def write(self, draft: Draft, file: str, chunks: Chunks) -> None:
        """Write one file of a draft whole, once more where it was begun before.  Raises OSError."""

    @abstractmethod
    def read_draft(self, draft: Draft, file: str) -> bytes | None:
        """A small file of a draft; None where it is not there yet."""

    @abstractmethod
    def publish(self, draft: Draft, manifest_file: str, manifest: bytes) -> None:
        """Make the draft the checkpoint of its name, at one moment.  Raises OSError."""

    @abstractmethod
    def set_aside(self, name: str, problem: str) -> None:
        """Keep a rejected checkpoint for inspection, where no reader accepts it."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Remove a published checkpoint; a reader sees all of it or nothing."""

    @abstractmethod
    def sweep(self) -> None:
        """Remove what writers that died left behind."""

    @abstractmethod
    def write_pointer(self, file: str, content: bytes) -> None:
        """Replace a small file at the root.  Raises OSError."""

    @abstractmethod
    def read_pointer(self, file: str) -> bytes | None:
        """A small file at the root; None where there is none."""


def open_store(location: str) -> Store:
    """The store at a local path or at a URL of fsspec."""
    if "://" in location:
        from dist_lm.checkpoint.object_store import ObjectStore

        return ObjectStore(location)
    return LocalStore(Path(location))


class LocalStore(Store):
    """A folder of a file system with atomic renames."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.location = str(root)

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted((folder.name for folder in self.root.glob(f"{PREFIX}*")), reverse=True)

    def size(self, name: str, file: str) -> int | None:
        path = self.root / name / file
        return path.stat().st_size if path.is_file() else None

    def read_range(self, name: str, file: str, start: int, end: int) -> bytes:
        with (self.root / name / file).open("rb") as content:
            content.seek(start)
            return content.read(end - start)

    def file_in(self, draft: Draft, file: str) -> str:
        return file

    def _hidden(self, draft: Draft) -> Path:
        return self.root / f".tmp-{draft.name}-{draft.tag}"

    def write(self, draft: Draft, file: str, chunks: Chunks) -> None:
        hidden = self._hidden(draft)
        hidden.mkdir(parents=True, exist_ok=True)
        with disk.WholeFile(hidden / file, hashed=False) as output:
            for chunk in chunks:
                output.write(chunk)
        disk.sync_folder(hidden)

    def read_draft(self, draft: Draft, file: str) -> bytes | None:
        path = self._hidden(draft) / file
        return path.read_bytes() if path.is_file() else None

    def publish(self, draft: Draft, manifest_file: str, manifest: bytes) -> None:
        hidden, target = self._hidden(draft), self.root / draft.name
        if target.is_dir() and not hidden.is_dir():
            # Tried again after the rename: it is published, and only the sync was missing.
            disk.sync_folder(self.root)
            return
        self.write(draft, manifest_file, [manifest])
        if target.exists():
            self.set_aside(draft.name, "it is saved again")
        os.rename(hidden, target)
        disk.sync_folder(self.root)

    def set_aside(self, name: str, problem: str) -> None:
        number = 0
        while (aside := self.root / f".bad-{name}-{number}").exists():
            number += 1
        os.rename(self.root / name, aside)
        log.warning("checkpoint %s is set aside as %s: %s", name, aside.name, problem)

    def remove(self, name: str) -> None:
        trash = self.root / f".trash-{name}"
        shutil.rmtree(trash, ignore_errors=True)
        os.rename(self.root / name, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def sweep(self) -> None:
        for pattern in (".tmp-*", ".trash-*"):
            for folder in self.root.glob(pattern):
                shutil.rmtree(folder, ignore_errors=True)

    def write_pointer(self, file: str, content: bytes) -> None:
        with disk.WholeFile(self.root / file) as output:
            output.write(content)

    def read_pointer(self, file: str) -> bytes | None:
        path = self.root / file
        return path.read_bytes() if path.is_file() else None
