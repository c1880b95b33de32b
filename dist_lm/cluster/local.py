"""Processes on this machine: one a rank, started, watched, restarted.

Enters: the command tail of `dist-lm train` and a number of ranks.  Leaves: their common exit code.
Promises: ops are built before any rank starts (D8); a crash is followed by a restart while restarts
are left, a configuration or data error never is; no rank outlives this process.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO

from dist_lm import ops
from dist_lm.checkpoint.store import open_store
from dist_lm.errors import EXIT_CRASH, EXIT_DONE, OutOfMemory, Stalled, StopRequested
from dist_lm.run_dir import RunDir

log = logging.getLogger(__name__)

_POLL_S = 0.05
PEER_GRACE_S = 3.0
"""How long the other ranks may take to tell their own error after one rank failed."""
STOP_GRACE_S = 120.0
"""How long ranks may take to save after a stop request."""
BACKOFF_S = (0.0, 1.0, 5.0, 15.0, 60.0)
"""Pause before a restart, by the number of attempts without a new checkpoint; the last one repeats."""
CRASH_LOOP = 3
"""Attempts in a row without a new checkpoint after which another one is no use."""
_PR_SET_PDEATHSIG = 1
RESTARTABLE = {EXIT_CRASH, Stalled.exit_code}


@dataclass(frozen=True)
class LocalLaunch:
    """What to start."""

    arguments: Sequence[str]
    """Arguments of `dist-lm train` without the launcher's own (--cpu, --max-restarts)."""
    num_ranks: int
    cpu: bool
    max_restarts: int
    run_dir: Path


def launch(plan: LocalLaunch) -> int:
    """Run all ranks to their end; returns the exit code of the run."""
    if plan.cpu:
        ops.build_cpu_op()
    run_dir = RunDir(plan.run_dir)
    without_progress = 0
    for restart in range(plan.max_restarts + 1):
        before = _committed(run_dir)
        group = _Group(plan, restart)
        code = group.run()
        smaller = code == OutOfMemory.exit_code and _committed(run_dir)[1] > before[1]
        if code not in RESTARTABLE and code >= 0 and not smaller:
            return code
        if group.stop_asked or run_dir.stop_file.exists():
            return StopRequested.exit_code
        without_progress = 0 if _committed(run_dir) != before else without_progress + 1
        if restart == plan.max_restarts or without_progress >= CRASH_LOOP:
            looped = f"  No checkpoint came of {without_progress} attempts in a row." if without_progress else ""
            log.error("attempt %d of %d ended: %s.%s", restart + 1, plan.max_restarts + 1, group.cause, looped)
            return code if code > 0 else EXIT_CRASH
        pause_s = BACKOFF_S[min(without_progress, len(BACKOFF_S) - 1)]
        log.warning(
            "attempt %d of %d ended: %s.  Going on from the last checkpoint in %.0f s",
            restart + 1,
            plan.max_restarts + 1,
            group.cause,
            pause_s,
        )
        if group.wait_for_stop(pause_s):
            return StopRequested.exit_code
    raise AssertionError("unreachable: the loop returns")


def _committed(run_dir: RunDir) -> tuple[list[str], int]:
    """What only an attempt that got on can have changed: checkpoints, and what later attempts must know."""
    names = open_store(run_dir.checkpoint_location()).names()
    return names[:1], len(run_dir.too_large()) + len(run_dir.read_list("rollbacks"))


class _Group:
    """The ranks of one attempt."""

    def __init__(self, plan: LocalLaunch, restart: int) -> None:
        self.plan, self.restart = plan, restart
        self.cause = ""
        self._stop_signal = 0
        self._ranks: list[subprocess.Popen[bytes]] = []

    def run(self) -> int:
        """Negative: the signal that ended the first rank to fail; otherwise its exit code."""
        with self._forwarded_signals(), contextlib.ExitStack() as files:
            try:
                self._start(files)
                return self._watch()
            finally:
                self._end()

    def _start(self, files: contextlib.ExitStack) -> None:
        port = free_port()
        for rank in range(self.plan.num_ranks):
            output: IO[bytes] | None = None
            if rank:
                output = files.enter_context(self._log_file(rank).open("ab"))
            self._ranks.append(
                subprocess.Popen(
                    [sys.executable, "-m", "dist_lm", "train", *self.plan.arguments],
                    env=self._environment(rank, port),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    preexec_fn=_die_with_parent,
                )
            )

    def _log_file(self, rank: int) -> Path:
        logs = RunDir(self.plan.run_dir).logs
        logs.mkdir(parents=True, exist_ok=True)
        return logs / f"rank-{rank:05d}.log"

    def _environment(self, rank: int, port: int) -> dict[str, str]:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.plan.num_ranks),
            "LOCAL_WORLD_SIZE": str(self.plan.num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "PYTHONUNBUFFERED": "1",
            "DIST_LM_LAUNCHER": "local",
        }
        if self.plan.cpu:
            cores = max(1, (os.cpu_count() or 1) // self.plan.num_ranks)
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            environment.setdefault("OMP_NUM_THREADS", str(cores))
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        return environment

    def _watch(self) -> int:
        """Wait until all ranks are done, or one failed."""
        while True:
            codes = [rank.poll() for rank in self._ranks]
            failed = [(number, code) for number, code in enumerate(codes) if code]
            if failed:
                return self._first_failure(*failed[0])
            if all(code == EXIT_DONE for code in codes):
                return EXIT_DONE
            time.sleep(_POLL_S)

    def _first_failure(self, rank: int, code: int) -> int:
        """Let the others tell what they know, then name the cause."""
        deadline = time.monotonic() + (STOP_GRACE_S if code == StopRequested.exit_code else PEER_GRACE_S)
        while time.monotonic() < deadline and any(process.poll() is None for process in self._ranks):
            time.sleep(_POLL_S)
        if code < 0:
            self.cause = f"rank {rank} (pid {self._ranks[rank].pid}) was ended by {signal.Signals(-code).name}"
            return code
        # A foreseen error of any rank explains more than the crash of its peers.
        codes = [process.poll() for process in self._ranks]
        for number, other in enumerate(codes):
            if other and other > 0 and other not in RESTARTABLE:
                rank, code = number, other
                break
        self.cause = f"rank {rank} ended with code {code}"
        # The first rank tells its foreseen errors itself; a crash nobody has told yet.
        if code == EXIT_CRASH or (rank and code != StopRequested.exit_code):
            self._show_error(rank)
        return code

    def _show_error(self, rank: int) -> None:
        found = sorted(RunDir(self.plan.run_dir).errors.glob(f"attempt-*-rank-{rank:05d}.txt"))
        if found:
            print(f"[rank {rank}] {found[-1].read_text().split(chr(10) * 2)[0]}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def _forwarded_signals(self) -> Iterator[None]:
        """Pass SIGTERM and SIGINT on to every rank; a second one is passed on too."""
        previous = {number: signal.signal(number, self._forward) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        again, self._stop_signal = bool(self._stop_signal), number
        for process in self._ranks:
            if process.poll() is None:
                # The second signal: at once, and no rank has a say in it.
                process.send_signal(signal.SIGKILL if again else signal.SIGTERM)

    @property
    def stop_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self._stop_signal)

    def wait_for_stop(self, seconds: float) -> bool:
        """Pause before a restart; True if a stop was asked for meanwhile."""
        with self._forwarded_signals():
            deadline = time.monotonic() + seconds
            while not self._stop_signal and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        return self.stop_asked

    def _end(self) -> None:
        for process in self._ranks:
            if process.poll() is None:
                process.kill()
        for process in self._ranks:
            process.wait()


def _die_with_parent() -> None:
    # Linux: when the launcher is killed, each rank is asked to stop, and saves.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    # Ctrl-C reaches the whole terminal group: only the launcher passes it on.
    os.setpgrp()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
