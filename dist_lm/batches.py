"""One step's work on one rank.

Enters: this rank's rows of a global batch.  Leaves: micro-batches, as many on every
rank, or why there are none; what all ranks have agreed about the step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

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
    """Time that this rank waited for its rows, and made micro-batches of them."""
    peer_seconds: float
    """Time that it then waited for the other ranks."""

    @property
    def slots(self) -> float:
        """Places for tokens on this rank, those of padding too."""
        return float(sum(part.slots for part in self.micro_batches))


def next_local(stream: Stream, task: Task, plan: BatchPlan, give_up: Callable[[], bool], mesh: Mesh) -> LocalBatch:
    """This rank's rows of the next step, or its part of them; a foreseen error is kept for all ranks to hear of.

    Empty where the rows are not here and `give_up` says not to wait for them.
    """
    local = LocalBatch()
    try:
        local.rows = stream.next_rows(give_up)
        if local.rows is not None:
            parts = task.divide(local.rows.rows, plan)
            local.micro_batches = [part_of(task.collate(rows), mesh) for rows in parts]
    except DistLMError as error:
        local.failure = error
    return local
