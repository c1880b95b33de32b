"""Lines of a jsonl file, by number: what predict and eval read.

Enters: a .jsonl file.  Leaves: its records, in order, with their line numbers.
Promises: a contiguous share of the lines can be read alone; a line that is no JSON object is given
out as the reason why, not skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dist_lm.disk import disk_errors
from dist_lm.errors import DataError


@dataclass(frozen=True)
class Line:
    """One record."""

    number: int
    """Counted from 1."""
    fields: dict[str, Any]
    problem: str = ""
    """Why there are no fields; empty where there are."""


def count_lines(path: Path) -> int:
    """Lines of the file that are not blank.  DataError where there is none."""
    with disk_errors(path, "read the records"), path.open("rb") as file:
        count = sum(1 for line in file if line.strip())
    if not count:
        raise DataError("the input holds no records", where=str(path), do="Give a .jsonl file, a JSON object a line.")
    return count


def read_lines(path: Path, begin: int, end: int) -> Iterator[Line]:
    """Records [begin, end) of those that are not blank."""
    with disk_errors(path, "read the records"), path.open("rb") as file:
        filled = ((number, line) for number, line in enumerate(file, start=1) if line.strip())
        for number, raw in islice(filled, begin, end):
            yield _line(number, raw)


def _line(number: int, raw: bytes) -> Line:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        return Line(number, {}, f"not JSON: {error}")
    if not isinstance(fields, dict):
        return Line(number, {}, "not a JSON object")
    return Line(number, fields)
