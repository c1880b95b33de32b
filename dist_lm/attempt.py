"""One attempt at a run: who trains, whether it still may, how it ended.

Enters: a claimed run folder and the ranks.  Leaves: attempts/NNNN.json, a lease, a watched process.
Promises: an attempt that was killed is recorded by the next one, from its last beat; `end` may be
called twice.
"""

from __future__ import annotations

import os
import platform
import time
from typing import Any

from dist_lm import duration, lease, stop
from dist_lm.config import RunSection
from dist_lm.errors import EXIT_CRASH, EXIT_DONE, DistLMError
from dist_lm.lease import Fenced, Lease
from dist_lm.ranks import Ranks
from dist_lm.run_dir import RunDir
from dist_lm.run_log import RunLog
from dist_lm.stop import StopFlag
from dist_lm.watchdog import Watchdog


class Attempt:
    """The attempt that this process takes part in."""

    def __init__(self, run_dir: RunDir, number: int, held: Lease | None, stop_flag: StopFlag) -> None:
        self.run_dir, self.number, self.stop = run_dir, number, stop_flag
        self._lease = held
        self.watch: Watchdog
        self.lost: DistLMError | None = None
        """Why this attempt may no longer write."""
        self._ended = False
        self._log: RunLog | None = None

    @classmethod
    def begin(cls, run_dir: RunDir, run: RunSection, ranks: Ranks, stop_flag: StopFlag, *, launcher: str) -> Attempt:
        """Take the run's lease, open the attempt, watch this process; a collective call."""
        facts = {
            "launcher": launcher,
            "world_size": ranks.world_size,
            "pids": ranks.gather(os.getpid()),
            "hosts": ranks.gather(platform.node()),
        }
        held: list[Lease] = []

        def take() -> int:
            number, before = run_dir.next_attempt(), lease.read(run_dir.leases)
            held.append(Lease.take(run_dir.leases, number))
            _close_the_one_before(run_dir, number - 1, before)
            run_dir.forget_stops()
            return run_dir.open_attempt(facts)

        number = ranks.agree(take)
        attempt = cls(run_dir, number, held[0] if held else None, stop_flag)
        attempt._start_watch(run, ranks, launcher)
        # What the local launcher's other ranks print is in their files already (cluster/local.py).
        if launcher != "local" or ranks.is_first:
            attempt._log = RunLog(run_dir.logs, ranks.rank)
        return attempt

    def _start_watch(self, run: RunSection, ranks: Ranks, launcher: str) -> None:
        duties = [
            stop.within_budget(
                self.stop,
                run.stop_budget_s,
                lambda: self.watch.give_up(f"stopping took longer than run.stop_budget_s, {run.stop_budget_s:.0f} s"),
            )
        ]
        duties += [
            stop.on_file(self.stop, self.run_dir.stop_file, stop.BY_COMMAND),
            stop.on_file(self.stop, self.run_dir.peer_stop_file, stop.BY_PEER),
            stop.tell_all(self.stop, self.run_dir.peer_stop_file),
        ]
        # A worker of Ray is started and ended by Ray.
        if launcher != "ray":
            duties.append(stop.on_orphaned(self.stop, grandparent=launcher == "deepspeed"))
        if ranks.is_first:
            duties.append(self._beat)
            if run.time_limit:
                duties.append(stop.at_time_limit(self.stop, duration.seconds(run.time_limit)))
        self.watch = Watchdog(
            self.run_dir, ranks.rank, ranks.world_size, self.number, floor_s=run.stall_limit_s, duties=duties
        )
        self.watch.start()

    def resumed_at(self, step: int) -> None:
        """Record the step that this attempt goes on from."""
        self.watch.step = step
        if self._lease:
            self.run_dir.add_to_attempt(self.number, from_step=step, step=step, resumed_at=time.time())

    def fence(self) -> None:
        """Raise Fenced where a later attempt has the run."""
        if self._lease:
            self._lease.check()

    def _beat(self) -> None:
        assert self._lease is not None
        try:
            self._lease.beat(step=self.watch.step, useful_s=self.watch.useful_s)
        except Fenced as error:
            self.lost = error

    def end(self, error: BaseException | None) -> None:
        """Close the record and give the lease back."""
        if self._ended:
            return
        self._ended = True
        self.watch.close()
        if self._log:
            self._log.close()
        if self._lease is None or isinstance(error, Fenced):
            return
        reason, code, what = "crash", EXIT_CRASH, repr(error)
        if error is None:
            reason, code, what = "done", EXIT_DONE, ""
        elif isinstance(error, DistLMError):
            reason, code, what = error.kind, error.exit_code, error.what
        known = {"step": self.watch.step, "useful_s": self.watch.useful_s}
        self.run_dir.close_attempt(self.number, reason=reason, exit_code=code, what=what, **known)
        self.run_dir.forget_stops()
        self._lease.release(**known)


def _close_the_one_before(run_dir: RunDir, number: int, before: dict[str, Any]) -> None:
    """Record an attempt that could not do it itself."""
    if number < 1 or "ended_at" in run_dir.attempt_facts(number):
        return
    known = before if before.get("attempt") == number else {}
    run_dir.close_attempt(
        number,
        reason="died",
        step=known.get("step", 0),
        useful_s=known.get("useful_s", 0.0),
        **({"ended_at": known["at"]} if "at" in known else {}),
    )
