"""Mixing: which source stands at a position of the stream, and at which position of its own.

Enters: the number of lanes, a seed, the weights of the sources in each stage.  Leaves: for any position
a source and a position in that source's Order.  Promises: the answer depends on nothing else, and every
position of every source stands at exactly one position of the stream, whatever the stages; each
lane of the stream reads one lane of each source, in sequence.  Nothing here touches a file.

How.  The positions of a lane are cut into blocks of BLOCK_ROWS.  A block holds of each source exactly
its share, rounded by largest remainders; a keyed permutation of the block says where.  The n-th place
of a source in lane l is its position n x lanes + l, which is in lane l of its Order too.  How many places
a source had in the blocks before is a multiplication; inside a block they are counted.  A stage may
end in the middle of a block; the next begins a block of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from dist_lm.data.order import Ints, keyed_hash, permute
from dist_lm.errors import ConfigError

MIXTURE_VERSION = 1
"""Changes whenever the same arguments would give another mixture; part of every fingerprint."""
BLOCK_ROWS = 1024
"""Positions of a lane over which the shares are exact."""

_SLOTS = 5
"""What a hash is for; order.py has the others."""
_NOTHING = -1


@dataclass(frozen=True)
class Stage:
    """Weights that hold from one position on."""

    from_position: int
    row_weights: tuple[float, ...]
    """Share of each source, in rows; need not add up to 1."""


class Placed(NamedTuple):
    """Where positions of the stream lead; arrays of one length."""

    source: Ints
    position: Ints
    """In the Order of the source."""


class Mixture:
    """Positions of the stream to positions of its sources."""

    def __init__(self, names: Sequence[str], stages: Sequence[Stage], *, seed: int, lanes: int) -> None:
        self.names = tuple(names)
        self.seed = seed
        self.lanes = lanes
        self.starts = np.array([stage.from_position for stage in stages], dtype=np.int64)
        """[stages]; the position from which on a stage holds."""
        if self.starts[0] != 0 or (np.diff(self.starts) <= 0).any():
            begin = ", ".join(str(stage.from_position) for stage in stages)
            raise ConfigError(
                f"the stages of a mixture begin at positions {begin}", do="Let each begin after the last."
            )
        self.block_counts = np.stack([_shares(names, stage.row_weights) for stage in stages])
        """[stages, sources]; rows of each source in a block."""
        idle = [name for name, count in zip(names, self.block_counts.sum(axis=0), strict=True) if not count]
        if idle:
            raise ConfigError(
                f"the source '{idle[0]}' has weight 0 from beginning to end",
                where="data.train, data.stages",
                do="Remove it, or give it a weight in some stage.",
            )
        # The slots of a stage's block before its permutation.
        self._slots = [np.repeat(np.arange(len(names)), counts) for counts in self.block_counts]
        # The first position of a stage in each lane, and what each lane has read of each source before.
        lane = np.arange(lanes)
        self._lane_starts = np.maximum(-(-(self.starts[:, None] - lane) // lanes), 0)
        self._before = np.zeros((len(stages), lanes, len(names)), dtype=np.int64)
        for stage in range(1, len(stages)):
            rows = self._lane_starts[stage] - self._lane_starts[stage - 1]
            self._before[stage] = self._before[stage - 1] + self._read_of_stage(stage - 1, rows)
        # The block that each lane is in.  Forgetting and recomputing it changes nothing.
        self._block = np.full((lanes, 2), _NOTHING, dtype=np.int64)
        self._source = np.zeros((lanes, BLOCK_ROWS), dtype=np.int16)
        self._ordinal = np.zeros((lanes, BLOCK_ROWS), dtype=np.int32)

    def fingerprint_parts(self, position: int) -> dict[str, Any]:
        """What decides the mixture before `position`: a later stage does not change what was read."""
        begun = self.starts < max(position, 1)
        stages = zip(self.starts[begun].tolist(), self.block_counts[begun].tolist(), strict=True)
        return {"mixture_version": MIXTURE_VERSION, "block_rows": BLOCK_ROWS, "stages": list(stages)}

    def place(self, positions: Any) -> Placed:
        positions = np.asarray(positions, dtype=np.int64)
        lane, in_lane = positions % self.lanes, positions // self.lanes
        stage = np.searchsorted(self.starts, positions, side="right") - 1
        block, offset = np.divmod(in_lane - self._lane_starts[stage, lane], BLOCK_ROWS)
        source, ordinal = np.empty_like(positions), np.empty_like(positions)
        missing = np.arange(len(positions))
        while missing.size:
            here = (self._block[lane[missing], 0] == stage[missing]) & (self._block[lane[missing], 1] == block[missing])
            ready, missing = missing[here], missing[~here]
            source[ready] = self._source[lane[ready], offset[ready]]
            ordinal[ready] = self._ordinal[lane[ready], offset[ready]]
            for at in missing[np.unique(lane[missing], return_index=True)[1]]:
                self._enter(int(lane[at]), int(stage[at]), int(block[at]))
        place = self._before[stage, lane, source] + block * self.block_counts[stage, source] + ordinal
        return Placed(source, place * self.lanes + lane)

    def read_before(self, position: int) -> Ints:
        """[sources]; rows of each source among the positions [0, position)."""
        stage = int(np.searchsorted(self.starts, max(position - 1, 0), side="right")) - 1
        in_lane = np.maximum(-(-(position - np.arange(self.lanes)) // self.lanes), 0)
        rows = in_lane - self._lane_starts[stage]
        return np.asarray((self._before[stage] + self._read_of_stage(stage, rows)).sum(axis=0))

    def _read_of_stage(self, stage: int, rows: Ints) -> Ints:
        """[lanes, sources]; rows of each source among the first `rows` [lanes] of a stage."""
        blocks, rest = np.divmod(np.maximum(rows, 0), BLOCK_ROWS)
        read = blocks[:, None] * self.block_counts[stage]
        for lane in np.flatnonzero(rest):
            begun = self._sources_of_block(int(lane), stage, int(blocks[lane]))[: rest[lane]]
            read[lane] += np.bincount(begun, minlength=len(self.names))
        return np.asarray(read)

    def _sources_of_block(self, lane: int, stage: int, block: int) -> Ints:
        """[BLOCK_ROWS]; the source of each place."""
        key = keyed_hash(self.seed, _SLOTS, stage, lane, block)
        return np.asarray(self._slots[stage][permute(np.arange(BLOCK_ROWS), BLOCK_ROWS, key)])

    def _enter(self, lane: int, stage: int, block: int) -> None:
        sources = self._sources_of_block(lane, stage, block)
        self._block[lane] = (stage, block)
        self._source[lane] = sources
        for source in range(len(self.names)):
            mine = np.flatnonzero(sources == source)
            self._ordinal[lane, mine] = np.arange(len(mine))


def _shares(names: Sequence[str], weights: Sequence[float]) -> Ints:
    """Rows of each source in a block: exact shares, rounded by largest remainders."""
    total = float(sum(weights))
    if total <= 0 or min(weights) < 0:
        listed = ", ".join(f"{name} {weight:g}" for name, weight in zip(names, weights, strict=True))
        what = "the weights of the sources are all 0" if total <= 0 else "a source has a negative weight"
        raise ConfigError(what, where="data.train, data.stages", why=listed, do="Give one of them a positive weight.")
    # Exact arithmetic: a tie must not be decided by the last bit of a rounded number.
    exact = [Fraction(weight) / sum(map(Fraction, weights)) * BLOCK_ROWS for weight in weights]
    counts = np.array([int(share) for share in exact], dtype=np.int64)
    by_remainder = sorted(range(len(exact)), key=lambda source: int(exact[source]) - exact[source])
    counts[by_remainder[: BLOCK_ROWS - int(counts.sum())]] += 1
    for name, weight, count in zip(names, weights, counts, strict=True):
        if weight > 0 and not count:
            raise ConfigError(
                f"the source '{name}' has less than one row in {BLOCK_ROWS}",
                where="data.train, data.stages",
                why=f"Its share of the rows is {weight / total:.2g}; it would never be read.",
                do="Raise its weight, or remove it.",
            )
    return counts
