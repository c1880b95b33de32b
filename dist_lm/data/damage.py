"""What damage of a shard is called, and which of it is new.

Enters: where a reader found damage, and why; what all ranks found.  Leaves: a DamagedData; a larger
quarantine.
Promises: the error crosses processes with its place; the quarantine is the same on every rank.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dist_lm.data.location import redact
from dist_lm.errors import DataError

WHOLE_SHARD = -1
"""In place of a block: the file or its index is missing, or not that of the manifest."""

Place = tuple[int, int, int]
"""Source of the mixture, shard (its place in the manifest), block or WHOLE_SHARD."""


class DamagedData(DataError):
    """A block of a shard, or a whole shard, is not what was written."""

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "", place: Place) -> None:
        super().__init__(what, where=where, why=why, do=do)
        self.place = place

    def at(self, *, source: int | None = None, shard: int | None = None) -> DamagedData:
        """The same error, by somebody who knows more of the place."""
        own_source, own_shard, block = self.place
        self.place = (own_source if source is None else source, own_shard if shard is None else shard, block)
        return self

    @property
    def facts(self) -> dict[str, object]:
        """For the metrics."""
        source, shard, block = self.place
        return {"source": source, "shard": shard, "block": block, "where": self.where, "why": self.why}

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.what, self.where, self.why, self.do, self.place)


def _rebuild(what: str, where: str, why: str, do: str, place: Place) -> DamagedData:
    return DamagedData(what, where=where, why=why, do=do, place=place)


def damaged(path: str, block: int | None, why: str, *, whole_shard: bool = False) -> DamagedData:
    """Damage in a block; None or `whole_shard`: nothing of the shard can be used, whatever block is named."""
    return DamagedData(
        "a shard is missing or damaged",
        where=redact(path) if block is None else f"{redact(path)}, block {block}",
        why=why,
        do="Copy the data set again, or prepare it again; `dist-lm data verify` checks all shards.",
        place=(0, 0, WHOLE_SHARD if block is None or whole_shard else block),
    )


def new_damage(failures: Sequence[Exception | None], quarantine: Collection[Place]) -> list[DamagedData]:
    """The damage that ranks found, each place once; empty where anything else failed, or nothing is new."""
    found: dict[Place, DamagedData] = {}
    for failure in failures:
        if isinstance(failure, DamagedData):
            found.setdefault(failure.place, failure)
        elif failure is not None:
            return []
    return [found[place] for place in sorted(found) if place not in quarantine]


def extend(quarantine: Collection[Place], found: Sequence[DamagedData], *, limit: int) -> list[Place]:
    """The quarantine with what was found, sorted.  Raises DataError where that is more than `limit` places."""
    larger = sorted({*quarantine, *(damage.place for damage in found)})
    if len(larger) > limit:
        raise DataError(
            f"more than {limit} blocks are damaged (data.max_quarantine)",
            where=found[-1].where,
            why=found[-1].why,
            do=found[-1].do,
        )
    return larger
