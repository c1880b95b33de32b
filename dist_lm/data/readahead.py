"""Shards into the cache before they are needed, and which of them is needed when.

Enters: an Order, the reader of its shards, the positions whose eras are about to be read.
Leaves: shards in the cache; for the shards of the data set, how far ahead they are needed next.
Promises: what it guesses wrong costs time and nothing else; it fetches nothing that would push out
what is needed sooner; what it fails at is met again, and told, by whoever needs the shard.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np

from dist_lm.data.location import join
from dist_lm.data.order import Ints, Order
from dist_lm.data.shards import ShardReader
from dist_lm.errors import DistLMError

log = logging.getLogger(__name__)

THREADS = 2
_MOST_ERAS = 4096
"""Eras that a plan looks at: a quarter of a second of work, done only when the cache must give up a shard."""
_CLOSE_S = 5.0


class Fetcher:
    """A few threads that do what they are given, one thing after the other."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._closed = False
        # Daemons: a download that hangs must not keep a finished process alive.
        self._threads: list[threading.Thread] = []

    def add(self, work: Callable[[], None]) -> None:
        if not self._threads and not self._closed:
            names = [f"dist_lm-fetcher-{number}" for number in range(THREADS)]
            self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
            for thread in self._threads:
                thread.start()
        self._work.put(work)

    def close(self) -> None:
        """Let what waits be; wait a little for what is under way."""
        self._closed = True
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(_CLOSE_S)

    def _run(self) -> None:
        while (work := self._work.get()) is not None and not self._closed:
            try:
                work()
            except (DistLMError, OSError) as error:
                log.info("a shard was not fetched ahead: %s", error)


class ReadAhead:
    """What the lanes of one data set read next."""

    def __init__(self, order: Order, reader: ShardReader, fetcher: Fetcher) -> None:
        self._order, self._reader, self._fetcher = order, reader, fetcher
        self._position = 0
        self._last_shard: dict[int, int] = {}

    def before(self, positions: Ints) -> None:
        """The eras of these positions, of a lane each, are about to be read."""
        self._position = int(positions.max())
        later = []
        for position in positions:
            shards = self._shards_from(int(position))
            now, _ = next(shards)
            lane = int(position) % self._order.lanes
            # A shard feeds many eras: what comes after it was asked for when it was begun.
            if self._last_shard.get(lane) != now[-1]:
                self._last_shard[lane] = now[-1]
                for shard in now:
                    self._fetch(shard, 0.0)
                later.append((now[-1], shards))
        for current, shards in later:
            found = next(((shard, ahead) for era, ahead in shards for shard in era if shard != current), None)
            if found is not None:
                self._fetch(*found)

    def next_use(self) -> dict[str, float]:
        """Location of each shard that any rank will read within an epoch: how many positions ahead."""
        found: dict[int, float] = {}
        lanes = [self._shards_from(self._position + lane) for lane in range(self._order.lanes)]
        rounds = min(_MOST_ERAS // self._order.lanes + 1, self._eras_an_epoch())
        for _ in range(rounds):
            for lane in lanes:
                shards, ahead = next(lane)
                for shard in shards:
                    found.setdefault(shard, ahead)
        entries = self._reader.manifest.shards
        return {join(self._reader.location, entries[shard].name): ahead for shard, ahead in found.items()}

    def _eras_an_epoch(self) -> int:
        return int(self._order.num_rows // (self._order.lanes * self._order.era)) + 2

    def _shards_from(self, position: int) -> Iterator[tuple[list[int], float]]:
        """The shards of one era after the other of the lane of a position, and how far ahead the era is."""
        order, at = self._order, position
        for _ in range(self._eras_an_epoch()):
            place = order.place(np.int64(at))
            ranges = order.era_ranges(int(place.epoch), int(place.lane), int(place.era))
            yield [part.shard for part in ranges], float(at - self._position)
            # The positions of a lane are `lanes` apart.
            at += (sum(part.hi - part.lo for part in ranges) - int(place.offset)) * order.lanes

    def _fetch(self, shard: int, needed_in: float) -> None:
        self._fetcher.add(lambda: self._reader.prefetch(shard, needed_in))
