"""Who may write into a run folder: one attempt at a time, and the latest one.

Enters: a run folder.  Leaves: leases/NNNN.json, named by the attempt, with its holder and a beat that
grows: a late holder can never write over the lease of a later one.
Promises: an attempt that is alive is not pushed aside by a second start; one that died is followed
at once (same host) or after TTL_S; what a late process of an earlier attempt wants to write is
refused.  One supervisor has one attempt: whoever it starts later takes over at once, from a holder on
a host that was cut off and still reaches the storage, too.  Clocks of hosts are never compared: a
holder is alive while its beat changes.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_lm import disk
from dist_lm.errors import EnvironmentFault

SUPERVISOR_VARIABLE = "DIST_LM_SUPERVISOR"
"""An id of the launcher that starts one attempt after the other; the same for all of them."""
TTL_S = 12.0
"""A holder on another host whose beat does not change for this long is gone."""
_LOOK_S = 0.5


class Fenced(EnvironmentFault):
    """Another attempt has taken over the run: this one may write nothing more."""


class Lease:
    """The right of one attempt to write; held by its first rank."""

    def __init__(self, folder: Path, attempt: int) -> None:
        self._folder, self.attempt = folder, attempt
        self._beats = 0

    @classmethod
    def take(
        cls,
        folder: Path,
        attempt: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> Lease:
        """Take the lease over from a holder that is gone.  Raises EnvironmentFault while it lives."""
        held = read(folder)
        changed_at, began_at = clock(), clock()
        beats = held.get("beats")
        while held and not held.get("released") and not _is_dead(held) and not _is_ours(held):
            if clock() - changed_at >= TTL_S:
                break
            if held.get("beats") != beats:
                beats, changed_at = held.get("beats"), clock()
                if clock() - began_at >= TTL_S:
                    raise EnvironmentFault(
                        "the run is being trained by another process",
                        where=str(folder.parent),
                        why=f"Attempt {held['attempt']}: process {held['pid']} on {held['host']} is alive.",
                        do="Wait for it, end it with `dist-lm stop`, or choose another run.dir.",
                    )
            pause(_LOOK_S)
            held = read(folder)
        lease = cls(folder, attempt)
        with disk.disk_errors(folder):
            folder.mkdir(exist_ok=True)
            lease._write({})
            for older in folder.glob("*.json"):
                if int(older.stem) < attempt:
                    older.unlink(missing_ok=True)
        return lease

    def beat(self, **facts: Any) -> None:
        """Show that the holder is alive.  `facts`: what the next attempt wants to know of this one."""
        self.check()
        self._beats += 1
        self._write(facts)

    def check(self) -> None:
        """Raise Fenced where a later attempt holds the lease."""
        held = read(self._folder)
        if held.get("attempt") != self.attempt or held.get("pid") != os.getpid():
            raise Fenced(
                f"attempt {self.attempt} has lost the run to attempt {held.get('attempt')}",
                where=str(self._folder),
                why=f"Process {held.get('pid')} on {held.get('host')} has taken over.",
                do="Nothing: the later attempt goes on.",
            )

    def release(self, **facts: Any) -> None:
        """Give the lease back, unless somebody has taken it."""
        held = read(self._folder)
        if held.get("attempt") == self.attempt and held.get("pid") == os.getpid():
            self._write({**facts, "released": True})

    def _write(self, facts: dict[str, Any]) -> None:
        holder = {
            **{"attempt": self.attempt, "host": platform.node(), "pid": os.getpid(), "beats": self._beats},
            "supervisor": os.environ.get(SUPERVISOR_VARIABLE, ""),
        }
        # A beat that a power cut takes away is no loss: the holder is gone, too.
        with disk.WholeFile(self._folder / f"{self.attempt:04d}.json", durable=not self._beats, hashed=False) as file:
            file.write(json.dumps({**facts, **holder, "at": time.time()}).encode())


def read(folder: Path) -> dict[str, Any]:
    """Who holds the lease: the latest attempt that took it.  Empty where nobody ever did."""
    for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem), reverse=True):
        # A later attempt may remove it at this moment: then that one's is read at the next look.
        with contextlib.suppress(FileNotFoundError):
            held: dict[str, Any] = json.loads(path.read_text())
            return held
    return {}


def _is_ours(held: dict[str, Any]) -> bool:
    """True where our own supervisor had started the holder, and has given it up since."""
    ours = os.environ.get(SUPERVISOR_VARIABLE, "")
    return bool(ours) and held.get("supervisor") == ours


def _is_dead(held: dict[str, Any]) -> bool:
    """True where the holder was a process of this host that is gone."""
    if held.get("host") != platform.node():
        return False
    if held.get("pid") == os.getpid():
        # An earlier run of this very process, or of a container whose processes count from 1 again.
        return True
    try:
        os.kill(int(held["pid"]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False
