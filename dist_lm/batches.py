"""One step's work on one rank.

Enters: this rank's rows of a global batch.  Leaves: micro-batches, as many on every
rank, or why there are none; what all ranks have agreed about the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from dist_lm.data.handover import Handover
from dist_lm.data.rows import StepRows
from dist_lm.data.stream import Stream
from dist_lm.errors import DistLMError
from dist_lm.mesh import Mesh
from dist_lm.schedule import BatchPlan
from dist_lm.sequence_parallel import part_of
from dist_lm.tasks.base import MicroBatch, Task


@dataclass
class LocalBatch:
    """What one rank brings to a step, before the ranks have spoken."""

    rows: StepRows | None = None
    micro_batches: list[MicroBatch] = field(default_factory=list)
    failure: DistLMError | None = None
    """Why there are no rows."""

    @property
    def is_idle(self) -> bool:
        """It was asked to stop before its rows were here."""
        return self.rows is None and self.failure is None

    def targets(self, objectives: Sequence[str]) -> list[float]:
        return [sum(batch.targets[name] for batch in self.micro_batches) for name in objectives]

    @property
    def tokens(self) -> int:
        """That are not padding."""
        return sum(batch.tokens for batch in self.micro_batches)


@dataclass(frozen=True)
class Batch:
    """What goes into one optimizer update."""

    rows: StepRows
    micro_batches: list[MicroBatch]
    targets: dict[str, float]
    """Objective -> targets over all ranks."""
    global_tokens: int
    """Tokens that are not padding, over all ranks."""
    local_tokens: int
    """Those of this rank."""
    seconds: float
    """Time that this rank waited for its rows, and for the micro-batches made of them."""
    peer_seconds: float
    """Time that it then waited for the other ranks."""

    @property
    def slots(self) -> float:
        """Places for tokens on this rank, those of padding too."""
        return float(sum(part.slots for part in self.micro_batches))


class LocalBatches:
    """This rank's part of each step, made of the stream's rows by a thread, one step ahead.

    It owns the stream.  `close` ends both; what was made ahead of the last step is dropped, and no
    position counts it.
    """

    def __init__(self, stream: Stream, task: Task, plan: BatchPlan, mesh: Mesh) -> None:
        self._stream, self._task, self._plan, self._mesh = stream, task, plan, mesh
        self._handover: Handover[LocalBatch] = Handover(limit=1)
        self._thread = self._handover.start(self._all(), "dist_lm-batches")

    def next(self, give_up: Callable[[], bool]) -> LocalBatch:
        """A foreseen error is kept for all ranks to hear of.

        Empty where the rows are not here and `give_up` says not to wait for them.
        """
        try:
            return self._handover.get(give_up) or LocalBatch()
        except DistLMError as error:
            return LocalBatch(failure=error)

    def _all(self) -> Iterator[LocalBatch]:
        while True:
            rows = self._stream.next_rows(lambda: self._handover.closed)
            if rows is None:
                return
            parts = self._task.divide(rows.rows, self._plan)
            yield LocalBatch(rows, [part_of(self._task.collate(part), self._mesh) for part in parts])

    def hurry(self) -> None:
        """Let `close` wait for no read that is under way: it may be one that hangs."""
        self._stream.hurry()

    def close(self) -> None:
        self._handover.close()
        self._stream.close()
        self._thread.join()

    def __enter__(self) -> LocalBatches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
