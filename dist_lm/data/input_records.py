"""What predict and eval read: the records of any input, by number.

Enters: what `data prepare` reads: a file, folder, pattern or URL.  Leaves: its records, in order.
Promises: a contiguous share can be read alone; what is no record is given out as the reason why, not
skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from dist_lm.data.location import redact
from dist_lm.data.sources.format import ReadSettings
from dist_lm.data.sources.inputs import read_records
from dist_lm.data.sources.record import BadRecords
from dist_lm.errors import DataError


@dataclass(frozen=True)
class InputRecord:
    """One record."""

    where: str
    """Such as file:line."""
    fields: dict[str, Any]
    problem: str = ""
    """Why there are no fields; empty where there are."""


@dataclass
class _Kept(BadRecords):
    """Keeps what is no record; predict and eval have a budget of their own for it."""

    waiting: list[InputRecord] = field(default_factory=list)

    def add(self, where: object, why: str) -> None:
        self.waiting.append(InputRecord(str(where), {}, why))

    def taken(self) -> list[InputRecord]:
        waiting, self.waiting = self.waiting, []
        return waiting


def count_input(given: str, settings: ReadSettings) -> int:
    """Records of an input.  DataError where there is none."""
    count = sum(1 for _ in _records(given, settings))
    if not count:
        raise DataError("the input holds no records", where=redact(given), do="Give a file with a record a line.")
    return count


def read_input(given: str, settings: ReadSettings, begin: int, end: int) -> Iterator[InputRecord]:
    """Records [begin, end) of an input."""
    yield from islice(_records(given, settings), begin, end)


def _records(given: str, settings: ReadSettings) -> Iterator[InputRecord]:
    bad = _Kept()
    for record in read_records([given], settings, bad):
        yield from bad.taken()
        yield InputRecord(str(record.where), dict(record.fields))
    yield from bad.taken()
