"""CSV and TSV with a header line: a record a row, all its fields texts.

Quoted fields may hold line ends, hence a file is not parted.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator

from dist_lm.data.sources.files import SourceFile, reading
from dist_lm.data.sources.format import Format, ReadSettings, Split
from dist_lm.data.sources.record import BadRecords, Record, Where

_UNDECODED_LOW, _UNDECODED_HIGH = "\udc80", "\udcff"


class Csv(Format):
    name = "csv"
    suffixes = (".csv",)
    delimiter = ","
    quoting: int = csv.QUOTE_MINIMAL

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        csv.field_size_limit(sys.maxsize)
        with reading(split.location) as file:
            # Bytes that are not UTF-8 become half surrogates, so that only their row is lost.
            text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
            rows = csv.reader(text, delimiter=self.delimiter, quoting=self.quoting, strict=True)  # type: ignore[arg-type]
            names: list[str] | None = None
            while True:
                where = Where(split.location, rows.line_num + 1)
                try:
                    row = next(rows, None)
                except csv.Error as error:
                    bad.add(where, f"not CSV: {error}")
                    continue
                if row is None:
                    return
                if not row:
                    continue
                if names is None:
                    names = row
                    continue
                problem = _problem(row, names)
                if problem:
                    bad.add(where, problem)
                else:
                    yield Record(dict(zip(names, row, strict=True)), where)


class Tsv(Csv):
    """Tabs part the fields, and quotes are letters like others: what most tools write as .tsv."""

    name = "tsv"
    suffixes = (".tsv",)
    delimiter = "\t"
    quoting = csv.QUOTE_NONE

    def splits(self, file: SourceFile, target_bytes: int, settings: ReadSettings) -> list[Split]:
        return [Split(file.location, self.name)]


def _problem(row: list[str], names: list[str]) -> str | None:
    if len(row) != len(names):
        return f"{len(row)} fields, and the header has {len(names)}"
    for value in row:
        if not value.isascii():
            wrong = [letter for letter in value if _UNDECODED_LOW <= letter <= _UNDECODED_HIGH]
            if wrong:
                return f"not UTF-8: byte 0x{ord(wrong[0]) - 0xDC00:02x}"
    return None
