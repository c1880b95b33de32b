"""A thread that sees what the loop cannot: stalls, a launcher that died, requests in files.

Enters: the section that the loop is in.  Leaves: heartbeats/rank-NNNNN.json, and on a stall every
stack, the last collectives and the place of every rank in errors/, then the end of this process.
Promises: no collective; a rank that waits for a peer which is itself within its limits is not
stalled; a stalled group ends, so that its launcher can start it again.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dist_lm import disk
from dist_lm.duration import spoken
from dist_lm.errors import Stalled
from dist_lm.run_dir import RunDir

log = logging.getLogger(__name__)
SECTIONS = ("init", "data", "step", "evaluation", "checkpoint")
LONGEST_SEEN = 5.0
"""A section may take this many times the longest seen."""
UNSEEN = 10.0
"""A section that was never finished may take this many times the least limit."""
TICK_S = 1.0
_LEAST_TICK_S = 0.01
_PY_SPY_S = 30.0
_SILENT_TICKS = 5
"""Looks without a new beat after which a peer counts as frozen."""


def limit_s(floor_s: float, longest_s: float | None) -> float:
    """Time that a section may take."""
    return floor_s * UNSEEN if longest_s is None else max(floor_s, longest_s * LONGEST_SEEN)


def pause_s(waited_s: float, allowed_s: float) -> float:
    """Time to the next look: at the moment when a section has taken too long, so that the last rank of a group
    to be late finds the others so and ends it."""
    left_s = allowed_s - waited_s
    return TICK_S if left_s <= 0 else min(TICK_S, max(left_s, _LEAST_TICK_S))


class Watchdog:
    """Watches one rank."""

    def __init__(
        self,
        run_dir: RunDir,
        rank: int,
        world_size: int,
        attempt: int,
        *,
        floor_s: float,
        duties: Sequence[Callable[[], None]] = (),
        clock: Callable[[], float] = time.monotonic,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self._run_dir, self._rank, self._world_size, self._attempt = run_dir, rank, world_size, attempt
        self._floor_s, self._duties, self._clock, self._end = floor_s, duties, clock, end
        self._section, self.step, self._since = "init", 0, clock()
        self._longest_s: dict[str, float] = {}
        self._beats = 0
        self._peers: dict[int, tuple[Any, int]] = {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dist_lm-watchdog", daemon=True)
        self.useful_s = 0.0
        """Time in steps and their data, for goodput."""

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()

    def enter(self, section: str, step: int) -> None:
        """The loop is now in `section`; entering it again is progress, too."""
        now = self._clock()
        seconds = now - self._since
        self._longest_s[self._section] = max(seconds, self._longest_s.get(self._section, 0.0))
        if self._section in ("data", "step"):
            self.useful_s += seconds
        self._section, self.step, self._since = section, step, now

    def place(self) -> tuple[str, int, float]:
        """The section, its step, and the seconds that it has taken so far."""
        return self._section, self.step, self._clock() - self._since

    def _watch(self) -> None:
        while not self._closed.wait(pause_s(*self._waited(self._section, self._since))):
            self.tick()

    def _waited(self, section: str, since: float) -> tuple[float, float]:
        """Seconds that a section has taken, and that it may take."""
        return self._clock() - since, limit_s(self._floor_s, self._longest_s.get(section))

    def tick(self) -> None:
        """One look around."""
        for duty in self._duties:
            try:
                duty()
            except Exception as error:
                # The thread must live on: what cannot be written now may be written later.
                log.warning("rank %d: %s", self._rank, error)
        section, since = self._section, self._since
        waited_s, allowed_s = self._waited(section, since)
        self._beat(section, waited_s, allowed_s)
        if waited_s > allowed_s and self._nobody_moves() and since == self._since:
            self.give_up(
                f"rank {self._rank} made no progress for {spoken(waited_s)} in `{section}` at step {self.step}"
            )

    def _beat(self, section: str, waited_s: float, allowed_s: float) -> None:
        self._beats += 1
        facts = {
            "rank": self._rank,
            "attempt": self._attempt,
            "pid": os.getpid(),
            "section": section,
            "step": self.step,
            "beats": self._beats,
            "waited_s": round(waited_s, 1),
            "over": waited_s > allowed_s,
        }
        path = heartbeat_file(self._run_dir, self._rank)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with disk.WholeFile(path, durable=False, hashed=False) as file:
                file.write(json.dumps(facts).encode())
        except OSError as error:
            log.warning("rank %d cannot write its heartbeat: %s", self._rank, error)

    def _nobody_moves(self) -> bool:
        """True unless some peer still beats and is within its own limit."""
        moves = False
        for rank in range(self._world_size):
            if rank == self._rank:
                continue
            beat = read_heartbeat(self._run_dir, rank)
            seen, silent = self._peers.get(rank, (None, 0))
            silent = silent + 1 if beat.get("beats") == seen else 0
            self._peers[rank] = (beat.get("beats"), silent)
            moves = moves or (silent < _SILENT_TICKS and not beat.get("over"))
        return not moves

    def give_up(self, what: str) -> None:
        """Leave every stack in the run folder, tell what happened, end this process."""
        error = Stalled(
            what,
            where=str(self._run_dir.path),
            why="\n".join(self._places()[:4]),
            do="The run is started again from its last checkpoint; the stacks are in errors/.",
        )
        path = self._run_dir.write_error(self._attempt, self._rank, f"{error}\n\n" + "\n".join(self._places()) + "\n\n")
        with path.open("a") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        native_stacks(path)
        flight_record(path.with_suffix(".collectives.json"))
        log.error("%s", error)
        self._end(Stalled.exit_code)

    def _places(self) -> list[str]:
        """Which rank is where, the frozen ones first."""
        lines = []
        for rank in range(self._world_size):
            beat = read_heartbeat(self._run_dir, rank)
            frozen = self._peers.get(rank, (None, 0))[1] >= _SILENT_TICKS
            state = "does not answer, last seen" if frozen else "is"
            lines.append(
                f"rank {rank} {state} in `{beat.get('section', 'nowhere')}` at step {beat.get('step', 0)} "
                f"for {beat.get('waited_s', 0)} s"
            )
        return sorted(lines, key=lambda line: "does not answer" not in line)


def native_stacks(path: Path) -> None:
    """Add the stacks of this process with their C++ frames, where py-spy is installed."""
    program = shutil.which("py-spy", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if program is None:
        return
    words = [program, "dump", "--native", "--pid", str(os.getpid())]
    try:
        dumped = subprocess.run(words, capture_output=True, text=True, timeout=_PY_SPY_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        log.warning("py-spy: %s", error)
        return
    with path.open("a") as file:
        file.write(f"\n\n{dumped.stdout or dumped.stderr}")


def flight_record(path: Path) -> None:
    """Write what torch's flight recorder (of NCCL, and of gloo) has kept: the last collectives of this
    rank, with their shapes, and which of them began and ended.
    """
    import torch._C._distributed_c10d as c10d

    record = getattr(c10d, "_dump_fr_trace_json", None) or getattr(c10d, "_dump_nccl_trace_json", None)
    if record is not None:
        path.write_bytes(record())


def heartbeat_file(run_dir: RunDir, rank: int) -> Path:
    return run_dir.heartbeats / f"rank-{rank:05d}.json"


def read_heartbeat(run_dir: RunDir, rank: int) -> dict[str, Any]:
    """The last heartbeat of a rank; empty where there is none."""
    try:
        facts: dict[str, Any] = json.loads(heartbeat_file(run_dir, rank).read_text())
    except (OSError, ValueError):
        return {}
    return facts
