"""A local cache of remote shards, shared by the processes of a machine.

Enters: the location of a shard, with the size and hash that the manifest tells.  Leaves: an open local
file with that content, or None, which says: read it where it lies.  Promises: a file is used only after
its size and SHA-256 were compared, once in each process, however long it has been there; processes that
want the same shard at the same time download it once; the cache stays within its limit, gives up first
what is needed last, and touches no file that is open or that lies outside its own folder.  Nothing that
the disk does fails a run: without room, shards are read without the cache.

Files are named by a hash of the URL, so that two data sets may have the same shard names.  A file lock
for each name guards a download, and the lock of a killed process is free at once.  A reader holds a
shared `flock` on the file that it reads; whoever wants to remove a file needs it for himself.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import math
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

from filelock import FileLock

from dist_lm.data.location import name_of, without_secrets
from dist_lm.data.remote_file import PIECE_BYTES
from dist_lm.data.retry import Retries
from dist_lm.data.storage import open_file
from dist_lm.disk import sync_folder
from dist_lm.errors import DataError

log = logging.getLogger(__name__)

FOLDER = "dist_lm-shards"
"""The cache's own folder inside the one that the user names."""
_TEMPORARY = ".tmp"
_OWN_FILE = re.compile(r"[0-9a-f]{16}-[A-Za-z0-9._-]+")
_FETCHES = 2
"""Downloads of a shard whose hash is wrong, before the shard is called damaged."""

Damage = Callable[[BinaryIO], DataError]
"""What is wrong with a file whose size or hash is not that of the manifest."""


class _Entry(NamedTuple):
    """A file of the cache."""

    path: Path
    size: int
    used_ns: int


class ShardCache:
    """Copies of remote shards in one folder, together `limit_bytes` at most."""

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        retries: Retries | None = None,
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self.next_use: Callable[[], Mapping[str, float]] = dict
        """For locations that will be read again, how far ahead; asked when something must go."""
        self._folder = folder / FOLDER
        self._locks = self._folder / "locks"
        self._limit_bytes = limit_bytes
        self._retries = retries
        self._now_ns = now_ns
        self._verified: dict[str, tuple[int, int, int]] = {}
        self._closed = False
        self._warned = False
        with self._disk_may_refuse():
            self._locks.mkdir(parents=True, exist_ok=True)

    def open(
        self, location: str, *, size: int, sha256: str, damage: Damage, needed_in: float | None = None
    ) -> BinaryIO | None:
        """The shard as a local file, downloaded if need be; None if the cache cannot hold it.

        Raises DataError, as `damage` says, where the remote file is not the one of the manifest, and what
        the storage raises.  With `needed_in` only what is needed later than that may make room; without
        it, anything.
        """
        path = self._folder / key_of(location)
        with self._disk_may_refuse():
            file = self._present(path, size, sha256)
            if file is not None or self._closed:
                return file
        with open_file(location, buffer_bytes=0, retries=self._retries) as remote:
            # Asked outside of the disk's errors: a missing remote file is an OSError too.
            if remote.seek(0, os.SEEK_END) != size:
                raise damage(remote)
            with self._disk_may_refuse(), FileLock(self._locks / f"{path.name}.lock"):
                # Another process may have been quicker.
                file = self._present(path, size, sha256)
                if file is None and self._fetch(remote, path, size, sha256, damage, needed_in):
                    file = self._present(path, size, sha256)
                return file
        return None

    def _present(self, path: Path, size: int, sha256: str) -> BinaryIO | None:
        """The cached file, open and pinned, if it is there and right; what is wrong is removed."""
        try:
            file = open(path, "rb")  # noqa: SIM115 - whoever asked for it closes it
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)
        facts = os.fstat(file.fileno())
        if self._verified.get(path.name) != _stamp(facts):
            if facts.st_size != size or hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                log.warning("%s: the cached copy is damaged, or of another data set; fetching it again", path)
                file.close()
                path.unlink(missing_ok=True)
                return None
            file.seek(0)
            self._verified[path.name] = _stamp(facts)
        # The time of access orders what has no next use.  Another user's file keeps its own.
        with contextlib.suppress(PermissionError):
            os.utime(file.fileno(), ns=(self._now_ns(), facts.st_mtime_ns))
        return file

    def _fetch(
        self, remote: BinaryIO, path: Path, size: int, sha256: str, damage: Damage, needed_in: float | None
    ) -> bool:
        """Download to the final name; False if there is no room.  The lock of the name is held."""
        for attempt in range(1, _FETCHES + 1):
            file = self._reserve(path, size, needed_in)
            if file is None:
                return False
            temporary = Path(file.name)
            try:
                with file:
                    remote.seek(0)
                    if _copy(remote, file) == sha256:
                        file.flush()
                        os.fsync(file.fileno())
                        os.replace(temporary, path)
                        sync_folder(self._folder)
                        self._verified[path.name] = _stamp(os.fstat(file.fileno()))
                        return True
                    if attempt == _FETCHES:
                        raise damage(file)
            finally:
                temporary.unlink(missing_ok=True)
            log.warning("%s: what was downloaded has another SHA-256 than the manifest; again", remote.name)
        return False

    def _reserve(self, path: Path, size: int, needed_in: float | None) -> BinaryIO | None:
        """A new file of the full size, locked, once there is room for it; None if there is none."""
        with FileLock(self._locks / "room.lock"):
            entries = self._entries()
            excess = sum(entry.size for entry in entries) + size - self._limit_bytes
            for victim in self._victims(entries, needed_in) if excess > 0 else ():
                excess -= _remove(victim)
                if excess <= 0:
                    break
            if excess > 0:
                if needed_in is None:
                    self._warn(f"its limit of {self._limit_bytes} bytes has no room for {size} more")
                return None
            # Counted in full by other processes from now on, and locked before they can look.
            file = open(self._folder / f"{path.name}.{uuid.uuid4().hex}{_TEMPORARY}", "xb+")  # noqa: SIM115
            fcntl.flock(file, fcntl.LOCK_EX)
            file.truncate(size)
            return file

    def _victims(self, entries: list[_Entry], needed_in: float | None) -> list[Path]:
        """What may be removed, what is needed last first."""
        next_use = {key_of(location): use for location, use in self.next_use().items()}
        # What a killed download left has no next use; one that is under way is locked.
        known = [(next_use.get(entry.path.name, math.inf), -entry.used_ns, entry.path) for entry in entries]
        known.sort(key=lambda item: item[:2], reverse=True)
        return [path for use, _, path in known if needed_in is None or use > needed_in]

    def _entries(self) -> list[_Entry]:
        """The files that the cache made: nothing else in its folder is counted or removed."""
        found = []
        for path in self._folder.iterdir():
            # Another process may remove it at this moment.
            with contextlib.suppress(FileNotFoundError):
                facts = path.lstat()
                if _OWN_FILE.fullmatch(path.name) and stat.S_ISREG(facts.st_mode):
                    found.append(_Entry(path, facts.st_size, facts.st_atime_ns))
        return found

    @contextlib.contextmanager
    def _disk_may_refuse(self) -> Iterator[None]:
        """An error of the cache's disk ends the filling of the cache, and nothing else."""
        try:
            yield
        except OSError as error:
            self._closed = True
            self._warn(error)

    def _warn(self, why: object) -> None:
        if not self._warned:
            self._warned = True
            log.warning("the cache %s cannot hold more (%s); reading shards without it", self._folder, why)


def key_of(location: str) -> str:
    """The file name of a location: what it is called, and a hash of where it lies.

    Users and signatures are no part of it: they change while the shard stays.
    """
    digest = hashlib.sha256(without_secrets(location).encode()).hexdigest()[:16]
    return f"{digest}-{re.sub(r'[^A-Za-z0-9._-]', '_', name_of(location))}"


def _stamp(facts: os.stat_result) -> tuple[int, int, int]:
    """Tells whether a file is the one that was verified."""
    return facts.st_ino, facts.st_mtime_ns, facts.st_size


def _copy(remote: BinaryIO, file: BinaryIO) -> str:
    """SHA-256 of what was copied."""
    digest = hashlib.sha256()
    while piece := remote.read(PIECE_BYTES):
        digest.update(piece)
        file.write(piece)
    return digest.hexdigest()


def _remove(path: Path) -> int:
    """Bytes that removing a file has freed; none if somebody has it open."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            return os.fstat(file.fileno()).st_size
    except (BlockingIOError, FileNotFoundError):
        return 0
