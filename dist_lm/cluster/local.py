"""Processes on this machine: one a rank, started, watched, restarted.

Enters: a configuration and a number of ranks.  Leaves: their common exit code.
Promises: ops are built before any rank starts (D8); a crash is followed by a restart while restarts
are left, a configuration or data error never is; no rank outlives this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dist_lm import ops
from dist_lm.checkpoint.store import open_store
from dist_lm.cluster.rank_process import RankProcess
from dist_lm.errors import EXIT_CRASH, EXIT_DONE, OutOfMemory, Stalled, StopRequested
from dist_lm.lease import SUPERVISOR_VARIABLE
from dist_lm.run_dir import ROLLBACKS, RunDir
from dist_lm.run_log import log_file

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
RESTARTABLE = {EXIT_CRASH, Stalled.exit_code}


@dataclass(frozen=True)
class LocalLaunch:
    """What to start."""

    config: Path
    overrides: Sequence[str]
    num_ranks: int
    cpu: bool
    max_restarts: int
    run_dir: Path


def launch(plan: LocalLaunch) -> int:
    """Run all ranks to their end; returns the exit code of the run."""
    if plan.cpu:
        ops.build_cpu_op()
    run_dir = RunDir(plan.run_dir)
    os.environ[SUPERVISOR_VARIABLE] = uuid.uuid4().hex
    without_progress = 0
    for restart in range(plan.max_restarts + 1):
        before = _committed(run_dir)
        group = _Group(plan)
        code = group.run()
        if group.forced and code < 0:
            return 128 + group.forced
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
    return names[:1], len(run_dir.too_large()) + len(run_dir.read_list(ROLLBACKS))


class _Group:
    """The ranks of one attempt."""

    def __init__(self, plan: LocalLaunch) -> None:
        self.plan = plan
        self.cause = ""
        self._stop_signal = 0
        self.forced = 0
        """The second signal, at which the ranks were ended without a checkpoint."""
        self._ranks: list[RankProcess] = []
        self._starting = True

    def run(self) -> int:
        """Negative: the signal that ended the first rank to fail; otherwise its exit code."""
        with self._forwarded_signals():
            try:
                self._start()
                return self._watch()
            finally:
                self._end()

    def _start(self) -> None:
        port = free_port()
        os.environ.update(self._common_variables())
        for rank in range(self.plan.num_ranks):
            variables = {
                # The server that ranks are forked from may be older than some of them.
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(self.plan.num_ranks),
                "LOCAL_WORLD_SIZE": str(self.plan.num_ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            log_file = self._log_file(rank) if rank else None
            self._ranks.append(
                RankProcess(self.plan.config, self.plan.overrides, variables, log=log_file, fork=self.plan.cpu)
            )
        self._starting = False
        if self._stop_signal:
            # It came while the first rank was being started.
            self._pass_on(signal.SIGTERM)

    def _log_file(self, rank: int) -> Path:
        logs = RunDir(self.plan.run_dir).logs
        logs.mkdir(parents=True, exist_ok=True)
        return log_file(logs, rank)

    def _common_variables(self) -> dict[str, str]:
        """Variables of all ranks, which libraries read when they are imported."""
        common = {"PYTHONUNBUFFERED": "1"}
        if self.plan.cpu:
            cores = max(1, (os.cpu_count() or 1) // self.plan.num_ranks)
            common |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
            for name, value in {"OMP_NUM_THREADS": str(cores), "GLOO_SOCKET_IFNAME": "lo"}.items():
                common.setdefault(name, os.environ.get(name, value))
        return common

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
        codes = [process.poll() for process in self._ranks]
        if code in RESTARTABLE:
            # What a rank foresaw explains more than a signal, and a signal more than the crash of a peer
            # that lost its connection: that one may be seen first.
            rank, code = min(
                ((number, other) for number, other in enumerate(codes) if other),
                key=lambda failed: (failed[1] < 0 or failed[1] in RESTARTABLE, failed[1] > 0, failed[0] != rank),
            )
        if code < 0:
            self.cause = f"rank {rank} (pid {self._ranks[rank].pid}) was ended by {signal.Signals(-code).name}"
            return code
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
        if again:
            self.forced = number
        # The second signal: at once, and no rank has a say in it.
        self._pass_on(signal.SIGKILL if again else signal.SIGTERM)
        if again and self._starting:
            os._exit(128 + number)

    def _pass_on(self, number: int) -> None:
        for process in self._ranks:
            process.send_signal(number)

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
            process.send_signal(signal.SIGKILL)
        for process in self._ranks:
            process.end()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
