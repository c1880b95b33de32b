"""Checkpoints in object storage: no rename there, so the manifest is the marker and comes last.

Enters: a URL that fsspec reads, such as s3://bucket/run.  Leaves: as checkpoint/store.py says.
Promises: a prefix without a manifest does not exist for any reader; the files of each save have names
of their own, so that a late writer cannot change those of another.

    step-00000100/0001-0002/rank-00000.safetensors     0001-0002: attempt and number of the save
    step-00000100/manifest.json                        written last, removed first
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import fsspec

from dist_lm.checkpoint.store import PREFIX, Chunks, Draft, Store

log = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_PART_BYTES = 1 << 25


@contextlib.contextmanager
def _storage_errors() -> Iterator[None]:
    """Every failure of a client library as an OSError: writers try those again."""
    try:
        yield
    except (OSError, AssertionError):
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class ObjectStore(Store):
    """A prefix of an object store."""

    def __init__(self, url: str) -> None:
        self.location = url.rstrip("/")
        # Listings that are kept would hide what other ranks have written.
        self._files: Any
        self._files, root = fsspec.core.url_to_fs(self.location, use_listings_cache=False)
        self._root = root.rstrip("/")

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    @_storage_errors()
    def names(self) -> list[str]:
        try:
            entries = self._files.ls(self._root, detail=False, refresh=True)
        except FileNotFoundError:
            return []
        names = [entry.rstrip("/").rpartition("/")[2] for entry in entries]
        found = [name for name in names if name.startswith(PREFIX) and self.size(name, _MANIFEST) is not None]
        return sorted(found, reverse=True)

    @_storage_errors()
    def size(self, name: str, file: str) -> int | None:
        try:
            return int(self._files.info(self._path(name, file), refresh=True)["size"])
        except FileNotFoundError:
            return None

    @_storage_errors()
    def read_range(self, name: str, file: str, start: int, end: int) -> bytes:
        size = self.size(name, file)
        if size is None:
            raise FileNotFoundError(f"{self.where(name)}/{file}")
        end = min(end, size)
        if start >= end:
            return b""
        content: bytes = self._files.cat_file(self._path(name, file), start=start, end=end)
        return content

    def file_in(self, draft: Draft, file: str) -> str:
        return f"{draft.tag}/{file}"

    @_storage_errors()
    def write(self, draft: Draft, file: str, chunks: Chunks) -> None:
        path = self._path(draft.name, draft.tag, file)
        size = 0
        # An upload that is left early is given up: the object never comes to be.
        with self._files.open(path, "wb", block_size=_PART_BYTES) as output:
            try:
                for chunk in chunks:
                    size += output.write(chunk)
            except BaseException:
                output.discard()
                raise
        self._files.invalidate_cache()
        written = self.size(draft.name, self.file_in(draft, file))
        if written != size:
            raise OSError(f"{path} has {written} bytes after {size} were uploaded")

    def read_draft(self, draft: Draft, file: str) -> bytes | None:
        try:
            return self.read(draft.name, self.file_in(draft, file))
        except FileNotFoundError:
            return None

    @_storage_errors()
    def publish(self, draft: Draft, manifest_file: str, manifest: bytes) -> None:
        self._files.pipe_file(self._path(draft.name, manifest_file), manifest)
        self._files.invalidate_cache()
        for entry in self._files.ls(self._path(draft.name), detail=False, refresh=True):
            # What this manifest does not name: earlier saves of the same step.
            if entry.rstrip("/").rpartition("/")[2] not in (draft.tag, manifest_file):
                self._files.rm(entry, recursive=True)

    @_storage_errors()
    def set_aside(self, name: str, problem: str) -> None:
        number = 0
        while self.size(name, f"bad-{number}.json") is not None:
            number += 1
        self._files.copy(self._path(name, _MANIFEST), self._path(name, f"bad-{number}.json"))
        self._files.rm_file(self._path(name, _MANIFEST))
        self._files.invalidate_cache()
        log.warning("checkpoint %s is set aside, its manifest is now bad-%d.json: %s", name, number, problem)

    @_storage_errors()
    def remove(self, name: str) -> None:
        self._files.rm_file(self._path(name, _MANIFEST))
        self._files.rm(self._path(name), recursive=True)
        self._files.invalidate_cache()

    @_storage_errors()
    def sweep(self) -> None:
        try:
            entries = self._files.ls(self._root, detail=False, refresh=True)
        except FileNotFoundError:
            return
        for entry in entries:
            name = entry.rstrip("/").rpartition("/")[2]
            if not name.startswith(PREFIX) or self.size(name, _MANIFEST) is not None:
                continue
            # Nobody's any more, but for what was set aside for inspection.
            if self.size(name, "bad-0.json") is None:
                self._files.rm(entry, recursive=True)

    @_storage_errors()
    def write_pointer(self, file: str, content: bytes) -> None:
        self._files.pipe_file(self._path(file), content)

    @_storage_errors()
    def read_pointer(self, file: str) -> bytes | None:
        try:
            content: bytes = self._files.cat_file(self._path(file))
        except FileNotFoundError:
            return None
        return content
