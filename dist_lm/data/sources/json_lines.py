"""JSON lines: an object a line, a record each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from dist_lm.data.sources.files import SourceFile
from dist_lm.data.sources.format import Format, ReadSettings, Split, byte_ranges
from dist_lm.data.sources.lines import decode, lines
from dist_lm.data.sources.record import BadRecords, Record, Where


class JsonLines(Format):
    name = "jsonl"
    suffixes = (".jsonl", ".ndjson")

    def splits(self, file: SourceFile, target_bytes: int, settings: ReadSettings) -> list[Split]:
        return byte_ranges(file, self.name, target_bytes)

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        for where, raw in lines(split):
            line = decode(raw, where, bad)
            if line is None or not line.strip():
                continue
            fields = json_object(line, where, bad)
            if fields is not None:
                yield Record(fields, where)


def json_object(text: str, where: Where, bad: BadRecords) -> dict[str, Any] | None:
    """The object, or None where it is none (reported)."""
    try:
        value = json.loads(text)
    except RecursionError:
        bad.add(where, "JSON is nested too deeply")
        return None
    except ValueError as error:
        bad.add(where, f"not JSON: {error}")
        return None
    if not isinstance(value, dict):
        bad.add(where, f"a JSON object was expected, not {type(value).__name__}")
        return None
    return value
