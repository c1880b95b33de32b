"""Who may write into a run folder: one attempt at a time, and the latest one.

Enters: a run folder.  Leaves: lease.json with the attempt, its holder, and a beat that grows.
Promises: an attempt that is alive is not pushed aside by a second start; one that died is followed
at once (same host, or the same launch, whose launcher has given it up) or after TTL_S; what a late
process of an earlier attempt wants to write is refused.  Clocks of hosts are never compared: a holder
is alive while its beat changes.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_lm import disk
from dist_lm.errors import EnvironmentFault

TTL_S = 12.0
"""A holder on another host whose beat does not change for this long is gone."""
LAUNCH_VARIABLE = "DIST_LM_LAUNCH"
"""Names the launcher's process, where it runs one attempt after the other on several hosts."""
_LOOK_S = 0.5


class Fenced(EnvironmentFault):
    """Another attempt has taken over the run: this one may write nothing more."""


class Lease:
    """The right of one attempt to write; held by its first rank."""

    def __init__(self, path: Path, attempt: int) -> None:
        self._path, self.attempt = path, attempt
        self._beats = 0

    @classmethod
    def take(
        cls,
        path: Path,
        attempt: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> Lease:
        """Take the lease over from a holder that is gone.  Raises EnvironmentFault while it lives."""
        held = read(path)
        changed_at, began_at = clock(), clock()
        beats = held.get("beats")
        while held and not held.get("released") and not _is_given_up(held) and not _is_dead(held):
            if clock() - changed_at >= TTL_S:
                break
            if held.get("beats") != beats:
                beats, changed_at = held.get("beats"), clock()
                if clock() - began_at >= TTL_S:
                    raise EnvironmentFault(
                        "the run is being trained by another process",
                        where=str(path.parent),
                        why=f"Attempt {held['attempt']}: process {held['pid']} on {held['host']} is alive.",
                        do="Wait for it, end it with `dist-lm stop`, or choose another run.dir.",
                    )
            pause(_LOOK_S)
            held = read(path)
        lease = cls(path, attempt)
        lease._write({})
        return lease

    def beat(self, **facts: Any) -> None:
        """Show that the holder is alive.  `facts`: what the next attempt wants to know of this one."""
        self.check()
        self._beats += 1
        self._write(facts)

    def check(self) -> None:
        """Raise Fenced where a later attempt holds the lease."""
        held = read(self._path)
        if held.get("attempt") != self.attempt or held.get("pid") != os.getpid():
            raise Fenced(
                f"attempt {self.attempt} has lost the run to attempt {held.get('attempt')}",
                where=str(self._path),
                why=f"Process {held.get('pid')} on {held.get('host')} has taken over.",
                do="Nothing: the later attempt goes on.",
            )

    def release(self, **facts: Any) -> None:
        """Give the lease back, unless somebody has taken it."""
        held = read(self._path)
        if held.get("attempt") == self.attempt and held.get("pid") == os.getpid():
            self._write({**facts, "released": True})

    def _write(self, facts: dict[str, Any]) -> None:
        launch = os.environ.get(LAUNCH_VARIABLE, "")
        who = {"host": platform.node(), "pid": os.getpid(), "launch": launch}
        holder = {"attempt": self.attempt, **who, "beats": self._beats}
        # A beat that a power cut takes away is no loss: the holder is gone, too.
        with disk.WholeFile(self._path, durable=not self._beats, hashed=False) as file:
            file.write(json.dumps({**facts, **holder, "at": time.time()}).encode())


def read(path: Path) -> dict[str, Any]:
    """Who holds the lease; empty where nobody ever did."""
    try:
        held: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return held


def _is_given_up(held: dict[str, Any]) -> bool:
    launch = os.environ.get(LAUNCH_VARIABLE, "")
    return bool(launch) and held.get("launch") == launch


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
