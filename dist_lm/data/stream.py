"""This rank's rows of every global batch, read ahead.

Enters: a TrainingSet, the position to go on from, and which part of each global batch is ours.
Leaves: StepRows, read ahead by one thread.  Promises: the global batch at a position is the same
whatever the number of ranks, and whatever was read before; the only state is the position of the
next batch.  Every rank yields the same number of rows a step.  An error of the reader thread
reaches whoever asks for the next step; `close` leaves no thread.  Memory: the eras of each source (see
eras.py) and READ_AHEAD + 2 batches.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from types import TracebackType

import numpy as np

from dist_lm.data.cache import ShardCache
from dist_lm.data.damage import DamagedData, Place
from dist_lm.data.eras import Eras
from dist_lm.data.handover import Handover
from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.location import is_remote
from dist_lm.data.order import Ints
from dist_lm.data.readahead import Fetcher, ReadAhead
from dist_lm.data.rows import Rows, StepRows
from dist_lm.data.substitutes import SubstitutingReader
from dist_lm.data.training_set import TrainingSet
from dist_lm.errors import ConfigError, DataError

__all__ = ["HeldoutRows", "Rows", "StepRows", "Stream"]

CLOSE_TIMEOUT_S = 30.0
"""How long `close` waits for a read that is under way."""

log = logging.getLogger(__name__)


class Stream:
    """Iterator over this rank's rows of the global batches from `position` on; never ends."""

    def __init__(
        self,
        data: TrainingSet,
        *,
        global_rows: int,
        rank: int,
        world_size: int,
        position: int = 0,
        partner_columns: Sequence[str] = (),
        cache: ShardCache | None = None,
        quarantine: Collection[Place] = (),
    ) -> None:
        """Blocks in `quarantine` are answered by others (substitutes.py)."""
        _check_part(global_rows, rank, world_size, position)
        data.refuse_larger_batch(global_rows)
        self._data = data
        self._global_rows = global_rows
        self._rank = rank
        self._world_size = world_size
        # The slots of a rank step by world_size, the batches by global_rows.
        step = math.gcd(data.lanes, global_rows, world_size)
        own_lanes = range((position + rank) % step, data.lanes, step)
        self._fetcher = Fetcher() if cache is not None else None
        self._eras = []
        plans: list[ReadAhead] = []
        for number, source in enumerate(data.sources):
            out = [(shard, block) for of_source, shard, block in quarantine if of_source == number]
            reader = SubstitutingReader(source.location, source.view.manifest, out, cache=cache, reuse_memory=True)
            before = None
            if self._fetcher is not None and is_remote(source.location):
                plans.append(ReadAhead(source.order, reader, self._fetcher))
                before = plans[-1].before
            self._eras.append(
                Eras(
                    source.order,
                    source.view,
                    reader,
                    own_lanes,
                    partner_columns,
                    first_sample_id=source.first_sample_id,
                    before=before,
                )
            )
        if cache is not None:
            cache.next_use = lambda: {name: use for plan in plans for name, use in plan.next_use().items()}
        self._handover: Handover[StepRows] = Handover()
        self._close_timeout_s = CLOSE_TIMEOUT_S
        self._position = position
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[StepRows]:
        return self

    def __next__(self) -> StepRows:
        rows = self.next_rows()
        assert rows is not None
        return rows

    def next_rows(self, give_up: Callable[[], bool] = lambda: False) -> StepRows | None:
        """The next step's rows; None: they are not here yet, and `give_up` says not to wait for them."""
        with self._starting:
            if self._thread is None and not self._handover.closed:
                self._thread = self._handover.start(self._all_steps(), f"dist_lm-reader-{self._rank}")
        return self._handover.get(give_up)

    def hurry(self) -> None:
        """Let `close` wait for no read that is under way: it may be one that hangs."""
        self._close_timeout_s = 0.0

    def close(self) -> None:
        """End the reader thread.  May be called twice, and from another thread."""
        with self._starting:
            self._handover.close()
        if self._thread is not None:
            self._thread.join(self._close_timeout_s)
            if self._thread.is_alive() and self._close_timeout_s:
                log.warning("the data reader still waits for storage after %.0f s; left behind", CLOSE_TIMEOUT_S)
        if self._fetcher is not None:
            self._fetcher.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _all_steps(self) -> Iterator[StepRows]:
        position = self._position
        while True:
            yield self._step_rows(position)
            position += self._global_rows

    def _step_rows(self, position: int) -> StepRows:
        slots = np.arange(self._rank, self._global_rows, self._world_size)
        rows = self._eras[0].empty_rows(len(slots))
        if len(self._eras) == 1:
            self._read(0, rows, np.arange(len(slots)), position + slots)
        else:
            placed = self._data.mixture.place(position + slots)
            for source in np.unique(placed.source):
                at = np.flatnonzero(placed.source == source)
                self._read(int(source), rows, at, placed.position[at])
        rows = rows.padded(-(-self._global_rows // self._world_size))
        return StepRows(position, position + self._global_rows, rows)

    def _read(self, source: int, rows: Rows, at: Ints, positions: Ints) -> None:
        try:
            self._eras[source].read_into(rows, at, positions)
        except DamagedData as error:
            raise error.at(source=source) from None


def _check_part(global_rows: int, rank: int, world_size: int, position: int) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank {rank} is not one of {world_size} ranks", where="RANK, WORLD_SIZE")
    if global_rows < world_size:
        raise ConfigError(
            f"a global batch of {global_rows} rows cannot be divided among {world_size} ranks",
            where="batch.global",
            do=f"Set batch.global to {world_size} or more, or use fewer ranks.",
        )
    if position < 0:
        raise DataError(f"the data position {position} is negative", do="Resume from another checkpoint.")
