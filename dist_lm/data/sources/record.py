"""Records, where they come from, and what happens to those that cannot be used.

Enters: fields that a format has read.  Leaves: Records; BadRecords, which counts the others.
Promises: a refused record is told with its file and line, row or key.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

from dist_lm.data.location import redact
from dist_lm.data.storage import open_file
from dist_lm.errors import DataError

EXAMPLES_SHOWN = 3
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Where:
    """The place of a record; str() gives `file:line`, or `file:row` and the like."""

    location: str
    number: int | str
    """Line counted from `start`, row, or key."""
    start: int = 0
    """Byte of the file from which lines are counted."""

    def __str__(self) -> str:
        if self.start and isinstance(self.number, int):
            # Only told of the few records that are refused: nobody else pays for the counting.
            return f"{redact(self.location)}:{self.number + _lines_before(self.location, self.start)}"
        return f"{redact(self.location)}:{self.number}"


class Record(NamedTuple):
    """What a source says about one document or example."""

    fields: Mapping[str, Any]
    where: Where


class TooManyBad(DataError):
    """More records than allowed cannot be used."""


@dataclass
class BadRecords:
    """Counts what could not be used; above `limit`, `add` raises TooManyBad."""

    limit: int = 0
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first ones, each "file:line: reason"."""

    def add(self, where: object, why: str) -> None:
        self.count += 1
        if len(self.examples) < EXAMPLES_SHOWN:
            self.examples.append(f"{where}: {why}")
        self.check()

    def check(self) -> None:
        if self.count > self.limit:
            raise TooManyBad(
                f"{self.count} bad record{'s' if self.count > 1 else ''}, and {self.limit} are allowed",
                where=self.examples[0].partition(": ")[0],
                why="\n".join(self.examples),
                do=f"Correct the input, or allow more: --max-bad {max(10, 2 * self.count)} skips and counts them.",
            )


@lru_cache(maxsize=8)
def _lines_before(location: str, start: int) -> int:
    with open_file(location) as file:
        return sum(chunk.count(b"\n") for chunk in _chunks(file, start))


def _chunks(file: Any, num_bytes: int) -> Iterator[bytes]:
    while num_bytes > 0 and (chunk := file.read(min(_CHUNK_BYTES, num_bytes))):
        num_bytes -= len(chunk)
        yield chunk
