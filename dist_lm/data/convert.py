"""Records of any source as one .jsonl file; two files of lines as pairs.

Enters: what `data prepare` reads, or a source file and its translation, line by line.  Leaves: a
.jsonl file, which prepare, predict and eval read.
Promises: translations that do not run in parallel are refused with both counts; the file is there in
full or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Unusable
from dist_lm.data.sources.files import reading
from dist_lm.data.sources.format import ReadSettings
from dist_lm.data.sources.inputs import read_records
from dist_lm.data.sources.record import BadRecords
from dist_lm.disk import WholeFile, disk_errors
from dist_lm.errors import ConfigError, DataError


def convert_records(inputs: Sequence[str], settings: ReadSettings, out: Path, *, max_bad: int = 0) -> tuple[int, int]:
    """Write all records; returns how many there are, and how many could not be read."""
    _refuse_existing(out)
    bad = BadRecords(max_bad)
    count = 0
    with disk_errors(out), WholeFile(out) as file:
        for record in read_records(inputs, settings, bad):
            file.write((json.dumps(dict(record.fields), ensure_ascii=False, default=str) + "\n").encode())
            count += 1
    return count, bad.count


def pair_lines(source: str, target: str, out: Path, *, max_bad: int = 0) -> tuple[int, int]:
    """Line n of `source` and line n of `target` as a record of `source` and `target`.

    A pair with an empty or damaged side is bad.  Raises DataError where one file has more lines.
    """
    _refuse_existing(out)
    bad = BadRecords(max_bad)
    count = 0
    with disk_errors(out), WholeFile(out) as file, reading(source) as left, reading(target) as right:
        for number, (first, second) in enumerate(_side_by_side(left, right, source, target), start=1):
            try:
                pair = {"source": _text(first, "source"), "target": _text(second, "target")}
            except Unusable as reason:
                bad.add(f"{source}:{number}", str(reason))
                continue
            file.write((json.dumps(pair, ensure_ascii=False) + "\n").encode())
            count += 1
    return count, bad.count


def _side_by_side(
    left: Iterator[bytes], right: Iterator[bytes], source: str, target: str
) -> Iterator[tuple[bytes, bytes]]:
    number = 0
    for first in left:
        second = next(right, None)
        if second is None:
            raise _unaligned(source, number + 1 + sum(1 for _ in left), target, number)
        number += 1
        yield first, second
    rest = sum(1 for _ in right)
    if rest:
        raise _unaligned(source, number, target, number + rest)


def _unaligned(source: str, source_lines: int, target: str, target_lines: int) -> DataError:
    return DataError(
        "the files do not run in parallel",
        where=f"{source} and {target}",
        why=f"The first has {source_lines} lines, the second {target_lines}; line n of one must translate line n of "
        "the other.",
        do="Find the line that is missing; empty lines may stand where a translation is missing, and are counted.",
    )


def _text(raw: bytes, name: str) -> str:
    try:
        return checked.text({name: raw.decode("utf-8").strip("\r\n")}, name)
    except UnicodeDecodeError as error:
        raise Unusable(f"{name} is not UTF-8: {error}") from None


def _refuse_existing(out: Path) -> None:
    if out.exists():
        raise ConfigError(f"{out} exists already", where="--out", do="Choose a new file, or remove this one.")
