"""Where a run writes: rights, rename, free space, the clock of the storage.

Enters: a folder or URL.  Leaves: findings.  Promises: what a check writes it removes again.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dist_lm import disk
from dist_lm.data.location import EXTRAS, is_http, is_remote, local_path, redact, scheme_of
from dist_lm.doctor.finding import Finding, fail, of_error, ok, warn
from dist_lm.errors import DistLMError

if TYPE_CHECKING:
    from dist_lm.data.retry import Retries

LITTLE_BYTES = 5 * 10**9
NOTHING_BYTES = 200 * 10**6
MOST_SKEW_S = 2.0
"""Leases and checkpoint ages are told by clocks; this much is no harm."""


def check_folder(location: str | Path, check: str) -> Iterator[Finding]:
    """Write, read, rename and remove there, as a checkpoint does."""
    shown = redact(location)
    try:
        if is_remote(location):
            yield from _object(str(location), check)
            return
        path = local_path(location)
        existing = next(folder for folder in [path.absolute(), *path.absolute().parents] if folder.exists())
        if not existing.is_dir():
            yield fail(check, f"{shown}: {existing} is a file", "Choose another folder.")
            return
        skew_s = _write_and_rename(existing)
    except DistLMError as error:
        yield of_error(check, error)
        return
    yield ok(check, f"{shown}: written, read and renamed")
    yield _space(existing, check)
    if abs(skew_s) > MOST_SKEW_S:
        do = "Run chrony or another NTP client on this machine and on the file server."
        yield warn("clock", f"{existing} is {skew_s:+.1f} s away from this machine's clock", do)


def check_source(location: str | Path) -> Iterator[Finding]:
    """Where a URL names the data, there are a library for it and a server that answers."""
    missing = list(_library(location))
    yield from missing
    if is_remote(location) and not missing:
        from dist_lm.data import storage
        from dist_lm.data.manifest import MANIFEST_NAME

        try:
            storage.exists(storage.join(str(location), MANIFEST_NAME), retries=_few_retries())
        except DistLMError as error:
            yield of_error("storage", error)


def _few_retries() -> Retries:
    """A run waits for minutes until a server comes back; who looks wants to know."""
    from dist_lm.data.retry import Retries

    return Retries(attempts=2)


def _library(location: str | Path) -> Iterator[Finding]:
    """The library that opens the scheme of a URL."""
    scheme = scheme_of(location)
    extra = EXTRAS.get(scheme, "")
    if extra and not _importable(scheme):
        yield fail("storage", f"{redact(location)}: no library for {scheme}://", f"pip install 'dist-lm[{extra}]'")


def _importable(scheme: str) -> bool:
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError:
        return False
    return True


def _write_and_rename(folder: Path) -> float:
    """Seconds that the storage's clock is ahead of this machine's.  Raises EnvironmentFault."""
    probe = folder / f".dist-lm-doctor-{secrets.token_hex(8)}"
    moved = probe.with_name(probe.name + "-moved")
    content = secrets.token_bytes(1 << 16)
    with disk.disk_errors(folder), contextlib.ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, moved, ignore_errors=True)
        cleanup.callback(shutil.rmtree, probe, ignore_errors=True)
        probe.mkdir()
        (probe / "data").write_bytes(content)
        disk.sync_folder(probe)
        probe.rename(moved)
        skew_s = (moved / "data").stat().st_mtime - time.time()
        if (moved / "data").read_bytes() != content:
            raise OSError("what was read is not what was written")
    return skew_s


def _object(location: str, check: str) -> Iterator[Finding]:
    from dist_lm.data import storage
    from dist_lm.data.remote_file import file_system

    missing = list(_library(location))
    if missing or is_http(location):
        do = "Name a folder, or s3://..., gs://..., az://..."
        yield from missing or [fail(check, f"{redact(location)} is a web server: nothing can be written there", do)]
        return
    url = storage.join(location, f".dist-lm-doctor-{secrets.token_hex(8)}")
    content = secrets.token_bytes(1 << 16)
    retries = _few_retries()
    storage.write_bytes(url, content, retries=retries)
    same = storage.read_bytes(url, retries=retries) == content
    fs, key = file_system(url, retries)
    fs.rm_file(key)
    if same:
        yield ok(check, f"{redact(location)}: written and read")
    else:
        yield fail(check, f"{redact(location)} gives back other bytes than were written", "Use another storage.")


def _space(folder: Path, check: str) -> Finding:
    free = shutil.disk_usage(folder).free
    what = f"{free / 1e9:.1f} GB are free in {folder}"
    do = "Free some space, or choose a folder on another disk; `dist-lm plan` tells the size of a checkpoint."
    if free < NOTHING_BYTES:
        return fail(check, what, do)
    return warn(check, what, do) if free < LITTLE_BYTES else ok(check, what)
