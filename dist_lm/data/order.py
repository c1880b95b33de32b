"""The order of the data: which row stands at a position of the endless stream.  Pure arithmetic.

Enters: the rows of each shard, a seed, the number of lanes, the length of an era.  Leaves: for any
position its epoch, shard and row.  Promises: the answer depends on nothing else - no rank, world
size, worker, earlier call, or NumPy version (all arithmetic is our own, on uint64) - and every
epoch visits every row exactly once.  Nothing here touches a file.

How.  Position p lies in epoch p // num_rows and belongs to lane p % lanes, so that neighbours in
the stream come from different places of the data set.  Each epoch lays the shards out in a circle in
another order, cuts it at another row into one stretch for each lane, and shuffles each stretch inside
eras of `era` rows.  A lane reads its stretch in sequence, one era after the other, hence from few shards
at a time; going on anywhere needs one seek and one era for each lane.  The eras of the lanes end at
different positions (the first era of a lane is shorter), so that one lane refills at a time.

The file has three parts: hashes and permutations, the class Order, and the choice of partners.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_lm.errors import ConfigError, DataError

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

ORDER_VERSION = 1
"""Changes whenever the same arguments would give another order; part of every fingerprint."""

# What a hash is for stands after the seed: hashes of the same numbers for other uses must be unrelated.
_SHARD_ORDER = 1
_ERA_ORDER = 2
_PARTNER = 3
_CIRCLE_START = 4

# With six rounds permutations of fewer than a hundred elements still show structure; cost is no reason.
_FEISTEL_ROUNDS = 8
_START = np.uint64(0x243F6A8885A308D3)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_ALL_BITS = 2**64 - 1
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)


def mix64(x: Any) -> Hashes:
    """The splitmix64 step: a bijection of uint64 in which every input bit stirs every output bit."""
    x = np.asarray(x, dtype=np.uint64)
    # Arrays wrap round without a word, single numbers would warn; asking for silence costs more than the sum.
    mixed = x.reshape(-1) + _GOLDEN
    mixed ^= mixed >> _SHIFT_1
    mixed *= _MIX_1
    mixed ^= mixed >> _SHIFT_2
    mixed *= _MIX_2
    mixed ^= mixed >> _SHIFT_3
    return np.asarray(mixed.reshape(x.shape))


def _mix_one(x: int) -> int:
    """mix64 of a number."""
    x = (x + int(_GOLDEN)) & _ALL_BITS
    x = ((x ^ x >> 30) * int(_MIX_1)) & _ALL_BITS
    x = ((x ^ x >> 27) * int(_MIX_2)) & _ALL_BITS
    return x ^ x >> 31


def keyed_hash(*parts: Any) -> Hashes:
    """Hash of a tuple of integers in [0, 2**64); arrays broadcast against each other."""
    if all(isinstance(part, int) for part in parts):
        # Ten times as fast as NumPy with single numbers.
        number = int(_START)
        for part in parts:
            number = _mix_one(number ^ _mix_one(part))
        return np.asarray(number, dtype=np.uint64)
    state: Any = _START
    for part in parts:
        state = mix64(state ^ mix64(part))
    return np.asarray(state)


def permute(i: Any, n: Any, key: Any) -> Ints:
    """Where element i goes under the permutation of [0, n) that the key names.

    A Feistel network over the smallest sufficient number of bits; a value outside [0, n) goes round
    again, which keeps the map one to one.  `n` and `key` are single numbers or arrays of the shape
    of `i`; 0 <= i < n < 2**53.
    """
    values = np.array(i, dtype=np.uint64).reshape(-1)
    limits = np.asarray(n, dtype=np.uint64).reshape(-1)
    # frexp of n - 1 is its bit length, exact below 2**53.
    bits = np.maximum(np.frexp((np.maximum(limits, 1) - 1).astype(np.float64))[1], 2).astype(np.uint64)
    keys = mix64(key).reshape(-1)
    subkeys = list(mix64(keys ^ _TURNS))
    halves = 1 << -(-int(bits[0]) // 2)
    if limits.size == keys.size == 1 and values.size > halves:
        return _permute_many(values.astype(np.int64), int(limits[0]), int(bits[0]), subkeys).reshape(np.shape(i))
    turned = _feistel(values, bits, subkeys)
    outside = np.flatnonzero(turned >= limits)
    while outside.size:
        part = [x if x.size == 1 else x[outside] for x in (limits, bits, *subkeys)]
        again = _feistel(turned[outside], part[1], part[2:])
        turned[outside] = again
        outside = outside[again >= part[0]]
    return turned.astype(np.int64).reshape(np.shape(i))


def _feistel(values: Hashes, bits: Hashes, subkeys: Sequence[Hashes]) -> Hashes:
    """One pass of the network: the halves of each value stir each other in turn."""
    low_bits = bits - bits // np.uint64(2)
    one = np.uint64(1)
    low_mask, high_mask = (one << low_bits) - one, (one << (bits - low_bits)) - one
    high, low = values >> low_bits, values & low_mask
    for turn, subkey in enumerate(subkeys):
        if turn % 2 == 0:
            high = high ^ (mix64(low ^ subkey) & high_mask)
        else:
            low = low ^ (mix64(high ^ subkey) & low_mask)
    return np.asarray((high << low_bits) | low)


def _permute_many(values: Ints, limit: int, bits: int, subkeys: Sequence[Hashes]) -> Ints:
    """The same for many elements under one key: what a half can become is looked up, since few halves differ."""
    low_bits = bits - bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << (bits // 2)) - 1
    masks = np.where(np.arange(_FEISTEL_ROUNDS) % 2, low_mask, high_mask)[:, None]
    tables = mix64(np.arange(1 << low_bits, dtype=np.uint64) ^ np.stack(subkeys)).astype(np.int64) & masks

    def turned(values: Ints) -> Ints:
        high, low = values >> low_bits, values & low_mask
        for turn in range(0, _FEISTEL_ROUNDS, 2):
            # "clip", as all are inside: no copy to look for others.
            high ^= tables[turn].take(low, mode="clip")
            low ^= tables[turn + 1].take(high, mode="clip")
        return (high << low_bits) | low

    found = turned(values)
    outside = np.flatnonzero(found >= limit)
    while outside.size:
        again = turned(found[outside])
        found[outside] = again
        outside = outside[again >= limit]
    return found


_TURNS = mix64(np.arange(_FEISTEL_ROUNDS)).reshape(-1, 1)


class Place(NamedTuple):
    """Where positions lie in the order; arrays of one length, or single numbers."""

    epoch: Ints
    lane: Ints
    era: Ints
    offset: Ints
    """Place inside the era, in the order of the stream: before its permutation."""


class Located(NamedTuple):
    """Which rows positions stand for; arrays of one length."""

    epoch: Ints
    shard: Ints
    """Index into the shard_rows that the Order was made of."""
    row: Ints
    """Row inside the shard."""


class ShardRange(NamedTuple):
    """Rows [lo, hi) of one shard."""

    shard: int
    lo: int
    hi: int


class Order:
    """Positions to rows, for one data set, seed, number of lanes and era length."""

    def __init__(self, shard_rows: Sequence[int], *, seed: int, lanes: int, era: int) -> None:
        self.num_rows = sum(shard_rows)
        self.seed = seed
        self.lanes = lanes
        self.era = era
        if seed < 0 or seed >= 2**64:
            raise ConfigError(f"the seed {seed} is outside [0, 2**64)", where="run.seed")
        if lanes < 1 or era < 1:
            raise ConfigError(f"lanes ({lanes}) and era ({era}) must be positive", where="data.lanes, data.era")
        if lanes > self.num_rows:
            raise DataError(
                f"{lanes} lanes cannot share {self.num_rows} rows",
                where="data.lanes",
                why="Each lane reads rows of its own, so there must be a row for each lane.",
                do=f"Set data.lanes to {max(self.num_rows, 1)} or less, or prepare more data.",
            )
        self._shard_rows = np.asarray(shard_rows, dtype=np.int64)
        self._lane_rows, self._longer_lanes = divmod(self.num_rows, lanes)
        # Pure, so that forgetting and recomputing it changes nothing.
        self._layout = lru_cache(maxsize=4)(self._compute_layout)

    @property
    def fingerprint_parts(self) -> dict[str, int]:
        """What decides the order, beside the rows themselves."""
        return {"order_version": ORDER_VERSION, "seed": self.seed, "lanes": self.lanes, "era": self.era}

    def lane_of(self, positions: Any) -> Ints:
        return np.asarray(positions, dtype=np.int64) % self.lanes

    def place(self, positions: Any) -> Place:
        positions = np.asarray(positions, dtype=np.int64)
        epoch, in_epoch = np.divmod(positions, self.num_rows)
        lane = positions % self.lanes
        in_lane = in_epoch // self.lanes
        # The first era of a lane is cut short by the lane's phase.
        shifted = in_lane + self._phase(lane)
        era = shifted // self.era
        return Place(epoch, lane, era, np.minimum(in_lane, shifted - era * self.era))

    def locate(self, positions: Any) -> Located:
        """The rows at many positions at once."""
        positions = np.asarray(positions, dtype=np.int64).reshape(-1)
        place = self.place(positions)
        start, rows = self._era_bounds(place.epoch, place.lane, place.era)
        line = start + permute(place.offset, rows, self._era_key(place.epoch, place.lane, place.era))
        shard, row = np.empty_like(line), np.empty_like(line)
        # Epochs of one batch: one, or two where it straddles an end.
        for epoch in np.unique(place.epoch):
            chosen = place.epoch == epoch
            order, starts, turn = self._layout(int(epoch))
            on_circle = (line[chosen] + turn) % self.num_rows
            at = np.searchsorted(starts, on_circle, side="right") - 1
            shard[chosen], row[chosen] = order[at], on_circle - starts[at]
        return Located(place.epoch, shard, row)

    def era_ranges(self, epoch: int, lane: int, era: int) -> list[ShardRange]:
        """What a lane reads for one era, in reading order."""
        order, starts, turn = self._layout(epoch)
        start, rows = (int(x) for x in self._era_bounds(epoch, lane, era))
        start = (start + turn) % self.num_rows
        ranges = []
        while rows:
            at = int(np.searchsorted(starts, start, side="right")) - 1
            lo = start - int(starts[at])
            taken = min(rows, int(starts[at + 1]) - start)
            ranges.append(ShardRange(int(order[at]), lo, lo + taken))
            start, rows = (start + taken) % self.num_rows, rows - taken
        return ranges

    def era_permutation(self, epoch: int, lane: int, era: int) -> Ints:
        """For each offset of an era, the place of its row in the reading order of `era_ranges`."""
        _, rows = self._era_bounds(epoch, lane, era)
        return permute(np.arange(int(rows)), int(rows), self._era_key(epoch, lane, era))

    def _phase(self, lane: Any) -> Any:
        return lane * self.era // self.lanes

    def _era_bounds(self, epoch: Any, lane: Any, era: Any) -> tuple[Ints, Ints]:
        """First place, counted from where the epoch cuts its circle, and number of rows, of eras."""
        # The lane's number among the positions of this epoch; epochs begin at any position.
        stretch = (lane - epoch * self.num_rows) % self.lanes
        stretch_start = stretch * self._lane_rows + np.minimum(stretch, self._longer_lanes)
        stretch_rows = self._lane_rows + (stretch < self._longer_lanes)
        begin = np.maximum(era * self.era - self._phase(lane), 0)
        end = np.minimum((era + 1) * self.era - self._phase(lane), stretch_rows)
        return np.asarray(stretch_start + begin), np.asarray(end - begin)

    def _era_key(self, epoch: Any, lane: Any, era: Any) -> Hashes:
        return keyed_hash(self.seed, _ERA_ORDER, epoch, lane, era)

    def _compute_layout(self, epoch: int) -> tuple[Ints, Ints, int]:
        """Shards in the order of an epoch, where on its circle they begin, and where the circle is cut.

        Without the turn, a data set of few shards would meet the same rows in the same eras in every epoch.
        """
        num_shards = len(self._shard_rows)
        order = permute(np.arange(num_shards), num_shards, keyed_hash(self.seed, _SHARD_ORDER, epoch))
        starts = np.concatenate([[0], np.cumsum(self._shard_rows[order])])
        turn = int(keyed_hash(self.seed, _CIRCLE_START, epoch) % np.uint64(self.num_rows))
        return order, starts, turn


def partner_rows(rows: Any, block_rows: Any, *, seed: int, epoch: Any, sample_id: Any) -> Ints:
    """For each row of a block another row of the same block, chosen by its identity.

    `rows` are places inside blocks of `block_rows` rows.  Never the row itself, unless it is alone.
    """
    rows, block_rows = np.asarray(rows, dtype=np.int64), np.asarray(block_rows, dtype=np.int64)
    others = np.maximum(block_rows - 1, 1).astype(np.uint64)
    step = 1 + (keyed_hash(seed, _PARTNER, epoch, sample_id) % others).astype(np.int64)
    return np.asarray((rows + step) % block_rows)
