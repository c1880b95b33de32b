"""The eras that a rank is reading: blocks in, rows at any positions out.

Enters: an Order, a View and its ShardReader, the lanes that this rank reads.  Leaves: Rows at given
positions.  Promises: reads an era at most once while positions only grow, and holds one era for each
lane:

    lanes of this rank x (era + 2 x group_rows) x (bytes of a row + 24),

with min(era, rows of a lane) for era.  The lanes of a rank are lanes / gcd(lanes, global_rows,
world_size), so it holds fewest where the world size divides both lanes and the global batch.

The rows of all lanes lie in one array for each column, so that a batch is gathered by one `take` a
column, however many lanes it comes from.  Groups are kept whole: a row's partner stands in its group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.order import Ints, Order
from dist_lm.data.rows import PARTNER_PREFIX, Rows
from dist_lm.data.shards import ShardReader
from dist_lm.data.views import View

_NOTHING = -1


class Eras:
    """One era of each lane in memory."""

    def __init__(
        self,
        order: Order,
        view: View,
        reader: ShardReader,
        lanes: Sequence[int],
        partner_columns: Sequence[str] = (),
        *,
        first_sample_id: int = 0,
        before: Callable[[Ints], None] | None = None,
    ) -> None:
        """`before` is told the positions, of a lane each, whose eras are read next."""
        self._order = order
        self._view = view
        self._reader = reader
        self._before = before
        self._partner_columns = [view.column(name).name for name in partner_columns]
        self._shard_start = first_sample_id + np.concatenate([[0], np.cumsum(view.shard_rows)])
        # The region of a lane: its rows, and the order in which the stream wants them.
        self._region = np.full(order.lanes, _NOTHING, dtype=np.int64)
        self._region[list(lanes)] = np.arange(len(lanes))
        lane_rows = -(-order.num_rows // order.lanes)
        self._era_rows = min(order.era, lane_rows)
        largest_group = min(view.group_rows, max(view.shard_rows))
        self._region_rows = self._era_rows + 2 * (largest_group - 1)
        pool_rows = len(lanes) * self._region_rows
        self._pool: dict[str, NDArray[Any]] = {
            column.name: np.empty((pool_rows, *column.shape), column.numpy_dtype.newbyteorder("="))
            for column in view.columns
        }
        self._sample_id = np.empty(pool_rows, dtype=np.uint64)
        self._partner = np.empty(pool_rows if partner_columns else 0, dtype=np.int64)
        self._wanted = np.empty((len(lanes), self._era_rows), dtype=np.int64)
        # One more than fits, as the first era of a lane is cut short.
        self._eras_an_epoch = lane_rows // order.era + 2
        self._loaded = np.full(len(lanes), _NOTHING, dtype=np.int64)

    def empty_rows(self, count: int) -> Rows:
        """Room for rows of this data set and their partners."""
        columns = {name: np.empty((count, *x.shape[1:]), x.dtype) for name, x in self._pool.items()}
        for name in self._partner_columns:
            columns[PARTNER_PREFIX + name] = np.empty_like(columns[name])
        ids, epoch = np.empty(count, dtype=np.uint64), np.empty(count, dtype=np.int64)
        return Rows(columns, ids, epoch, np.ones(count, dtype=np.bool_))

    def read_into(self, rows: Rows, at: Ints, positions: Ints) -> None:
        """Put the rows at some positions into the places `at`; positions of a lane increase."""
        place = self._order.place(positions)
        region = self._region[place.lane]
        # Numbers the eras of a lane through all epochs.
        era = place.epoch * self._eras_an_epoch + place.era
        rows.epoch[at] = place.epoch
        waiting = np.arange(len(positions))
        early: list[tuple[Ints, Rows]] = []
        while (missing := waiting[self._loaded[region[waiting]] != era[waiting]]).size:
            # What the batch wants of an era must be out before the lane's next one is read.
            leaving = np.isin(region[waiting], region[missing]) & ~np.isin(waiting, missing)
            if leaving.any():
                out, waiting = waiting[leaving], waiting[~leaving]
                taken = self.empty_rows(len(out))
                self._gather(taken, np.arange(len(out)), self._wanted[region[out], place.offset[out]])
                early.append((at[out], taken))
            _, first = np.unique(region[missing], return_index=True)
            if self._before is not None:
                self._before(positions[missing[first]])
            for index in missing[first]:
                self._load(int(place.epoch[index]), int(place.lane[index]), int(place.era[index]))
                self._loaded[region[index]] = era[index]
        # All rows at once, those that are out as well: some other row stands for them.
        which = np.full(len(positions), waiting[0])
        which[waiting] = waiting
        self._gather(rows, at, self._wanted[region[which], place.offset[which]])
        for places, taken in early:
            rows.sample_id[places] = taken.sample_id
            for name, array in taken.columns.items():
                rows.columns[name][places] = array

    def _gather(self, rows: Rows, to: Ints, wanted: Ints) -> None:
        sources = [(name, self._pool[name], wanted) for name in self._pool]
        if self._partner_columns:
            partner = self._partner[wanted]
            sources += [(PARTNER_PREFIX + name, self._pool[name], partner) for name in self._partner_columns]
        rows.sample_id[to] = self._sample_id[wanted]
        for name, pool, which in sources:
            if len(to) == len(rows):
                # Of one source all rows: no copy in between.  "clip" spares a buffer.
                np.take(pool, which, axis=0, out=rows.columns[name], mode="clip")
            else:
                rows.columns[name][to] = pool[which]

    def _load(self, epoch: int, lane: int, era: int) -> None:
        """Replace the era of a lane."""
        region = int(self._region[lane])
        self._loaded[region] = _NOTHING
        at = region * self._region_rows
        wanted = []
        for shard, lo, hi in self._order.era_ranges(epoch, lane, era):
            first_row, end_row = self._view.group_range(shard, lo, hi)
            self._view.read_into(self._pool, at, self._reader, shard, first_row, end_row)
            end = at + end_row - first_row
            self._identify(at, end, shard, first_row, epoch)
            wanted.append(np.arange(at + lo - first_row, at + hi - first_row))
            at = end
        reading_order = np.concatenate(wanted)
        self._wanted[region, : len(reading_order)] = reading_order[self._order.era_permutation(epoch, lane, era)]

    def _identify(self, begin: int, end: int, shard: int, first_row: int, epoch: int) -> None:
        """Note for whole groups of one shard, just read, which rows they are and who their partners are."""
        rows = np.arange(first_row, first_row + end - begin)
        sample_id = (self._shard_start[shard] + rows).astype(np.uint64)
        self._sample_id[begin:end] = sample_id
        if self._partner_columns:
            partner = self._view.partners(shard, rows, seed=self._order.seed, epoch=epoch, sample_id=sample_id)
            self._partner[begin:end] = begin - first_row + partner
