"""Saving while training goes on: the loop waits for the copy to host memory only.

Enters: a snapshot on each rank.  Leaves: a published checkpoint, or an error for the loop.
Promises: at most one write is in flight on a rank, so memory does not grow; a write that failed is
tried again, then reported, and never taken for a success; no collective runs in the thread (ranks
report through files of the draft).

    every rank   snapshot -> thread: local copy, write rank file -> report file
    rank 0                   thread: wait for all reports -> fence -> manifest, publish, prune
    every rank               thread: copies of the files of the machine before, once published
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from dist_lm.checkpoint.commit import Retention, publish, tidy
from dist_lm.checkpoint.fragments import Fragment
from dist_lm.checkpoint.manifest import MANIFEST, Checkpoint, Progress
from dist_lm.checkpoint.nearest import LocalCopies
from dist_lm.checkpoint.snapshot import Snapshot
from dist_lm.checkpoint.store import Draft, Store, step_name
from dist_lm.errors import DataError, DistLMError, EnvironmentFault
from dist_lm.faults import fault_point
from dist_lm.ranks import Ranks

log = logging.getLogger(__name__)
RETRY_PAUSES_S = (0.5, 2.0, 8.0, 30.0)
"""Pauses before a failed write is tried again."""
_POLL_S = (0.01, 0.5)
"""First and longest pause between two looks for what another rank writes."""

T = TypeVar("T")


@dataclass(frozen=True)
class Published:
    """A save that has become a checkpoint."""

    step: int
    seconds: float
    """From the snapshot to the publication."""
    num_bytes: int


class Abandoned(Exception):
    """The run ends: nobody waits for this write any more."""


class Writer:
    """Snapshots and the thread that writes them, on one rank."""

    def __init__(
        self,
        store: Store,
        ranks: Ranks,
        *,
        run_id: str,
        attempt: int,
        retention: Retention,
        fence: Callable[[], None] = lambda: None,
        copies: LocalCopies | None = None,
        pauses_s: tuple[float, ...] = RETRY_PAUSES_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.ranks = store, ranks
        self._run_id, self._attempt, self._retention = run_id, attempt, retention
        self._fence, self._copies, self._pauses_s, self._clock = fence, copies, pauses_s, clock
        self._snapshot = Snapshot(ranks.device)
        self._num_saves = 0
        self._thread: threading.Thread | None = None
        self._ended, self._hurry = threading.Event(), threading.Event()
        self._written = threading.Event()
        self._written.set()
        self._published: list[Published] = []
        self._error: DistLMError | None = None

    @property
    def error(self) -> DistLMError | None:
        """Why a save failed for good; the loop raises it on all ranks."""
        return self._error

    def start(
        self,
        progress: Progress,
        fragments: Callable[[], Iterator[Fragment]],
        *,
        mark_best: dict[str, Any] | None = None,
    ) -> None:
        """Take the snapshot and begin to write it; every rank calls this at the same step.

        Waits for the write before, if that is still under way.
        """
        self._hurry.set()
        self._join()
        self._hurry.clear()
        self._reach("before_save", progress.step)
        self._snapshot.take(fragments)
        self._reach("after_snapshot", progress.step)
        self._num_saves += 1
        draft = Draft(step_name(progress.step), f"{self._attempt:04d}-{self._num_saves:04d}")
        self._written.clear()
        self._thread = threading.Thread(
            target=self._run, args=(draft, progress, mark_best), name="dist_lm-writer", daemon=True
        )
        self._thread.start()

    def finish(self) -> None:
        """Wait until the last save is published; a collective call.  Raises its error on all ranks."""
        # A rank that cannot write may be unable to report it, too: rank 0 learns it here, before it
        # waits for that report.
        self._written.wait()
        self.ranks.raise_together(self._error)
        if self.ranks.is_first:
            self._join()
        self.ranks.raise_together(self._error)
        # It is published: what is left are the neighbours' files.
        self._join()

    def abandon(self) -> None:
        """End the thread, published or not.  A draft is left for the next start to sweep."""
        self._ended.set()
        self._hurry.set()
        self._join()

    def take_published(self) -> list[Published]:
        """What was published since the last call; on rank 0."""
        taken, self._published = self._published, []
        return taken

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _reach(self, point: str, step: int) -> None:
        fault_point(point, rank=self.ranks.rank, step=step, attempt=self._attempt)

    def _run(self, draft: Draft, progress: Progress, mark_best: dict[str, Any] | None) -> None:
        try:
            self._save(draft, progress, mark_best)
            self._copy_neighbours(draft)
        except Abandoned:
            pass
        except DistLMError as error:
            self._error = error
        except Exception as error:
            self._error = EnvironmentFault(
                f"checkpoint {draft.name} could not be written", where=self.store.location, why=repr(error)
            )
        finally:
            self._written.set()

    def _save(self, draft: Draft, progress: Progress, mark_best: dict[str, Any] | None) -> None:
        began_at = self._clock()
        if self._copies:
            self._copies.keep(draft.name, _file_name(self.ranks.rank), self._snapshot.chunks())
        report = self._persist("write", lambda: self._write_own(draft, progress.step))
        self._written.set()
        if not self.ranks.is_first:
            return
        reports = self._await_reports(draft, report)

        def reached(point: str) -> None:
            self._reach(point, progress.step)

        def publish_draft() -> None:
            self._fence()
            publish(self.store, draft, progress, self._run_id, reports, reached)

        self._persist("publish", publish_draft)
        self._persist("prune", lambda: tidy(self.store, mark_best, self._retention, reached))
        num_bytes = sum(int(entry["bytes"]) for entry in reports)
        self._published.append(Published(progress.step, self._clock() - began_at, num_bytes))

    def _copy_neighbours(self, draft: Draft) -> None:
        """From the store, once it is published; given up where the next save begins before."""
        ranks = self._copies.neighbours() if self._copies else []
        if not self._copies or not ranks:
            return
        try:
            if _await(lambda: self.store.size(draft.name, MANIFEST), self._hurry) is None:
                return
            checkpoint = Checkpoint.read(self.store, draft.name)
            for rank in ranks:
                self._copies.keep(
                    draft.name, _file_name(rank), self._unhurried(checkpoint, sorted(checkpoint.files)[rank])
                )
        except (OSError, DataError) as error:
            log.warning("rank %d cannot copy its neighbours' files: %s", self.ranks.rank, error)

    def _unhurried(self, checkpoint: Checkpoint, file: str) -> Iterator[bytes]:
        for chunk in self.store.chunks(checkpoint.name, file):
            if self._hurry.is_set():
                raise OSError("the next save begins")
            yield chunk

    def _persist(self, verb: str, action: Callable[[], Any]) -> Any:
        """Do it, again after each pause; the last failure becomes an EnvironmentFault."""
        for pause_s in (*self._pauses_s, None):
            if self._ended.is_set():
                raise Abandoned
            try:
                return action()
            except OSError as error:
                if pause_s is None:
                    raise EnvironmentFault(
                        f"rank {self.ranks.rank} cannot {verb} a checkpoint",
                        where=self.store.location,
                        why=f"Tried {len(self._pauses_s) + 1} times: {error}",
                        do="Free space there or mend the storage, then run the same command again.",
                    ) from error
                log.warning("rank %d cannot %s a checkpoint yet: %s", self.ranks.rank, verb, error)
                self._ended.wait(pause_s)
        raise AssertionError("unreachable: the last failure raises")

    def _write_own(self, draft: Draft, step: int) -> dict[str, Any]:
        rank = self.ranks.rank
        self._reach("before_write", step)
        digest, size = hashlib.sha256(), 0

        def hashed() -> Iterator[bytes | memoryview]:
            nonlocal size
            for number, chunk in enumerate(self._snapshot.chunks()):
                if number == 1:
                    self._reach("in_write", step)
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        name = _file_name(rank)
        self.store.write(draft, name, hashed())
        self._reach("after_write", step)
        report = {
            "file": self.store.file_in(draft, name),
            "bytes": size,
            "sha256": digest.hexdigest(),
            "pieces": self._snapshot.pieces,
        }
        if rank:
            self.store.write(draft, _report_name(rank), [json.dumps(report).encode()])
            self._reach("after_report", step)
        return report

    def _await_reports(self, draft: Draft, own: dict[str, Any]) -> list[dict[str, Any]]:
        reports = [own]
        for rank in range(1, self.ranks.world_size):
            # Without a limit: a rank that is gone ends the loop's collectives, and those end this.
            content = _await(partial(self._look, draft, rank), self._ended)
            if content is None:
                raise Abandoned
            reports.append(json.loads(content))
        return reports

    def _look(self, draft: Draft, rank: int) -> bytes | None:
        found: bytes | None = self._persist("read", lambda: self.store.read_draft(draft, _report_name(rank)))
        return found


def _await(look: Callable[[], T | None], given_up: threading.Event) -> T | None:
    """What `look` finds in the end; None where it was given up before."""
    pause_s, longest_s = _POLL_S
    while (found := look()) is None:
        if given_up.wait(pause_s):
            return None
        pause_s = min(pause_s * 1.5, longest_s)
    return found


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def _report_name(rank: int) -> str:
    return f"rank-{rank:05d}.json"
