"""Lines of a file, or of a range of its bytes.

Enters: a Split.  Leaves: lines as bytes, numbered.  Promises: the ranges of a file together give each
line once; text that is not UTF-8 is reported and never guessed at.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_lm.data.sources.files import reading
from dist_lm.data.sources.format import Split
from dist_lm.data.sources.record import BadRecords, Where

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def lines(split: Split) -> Iterator[tuple[Where, bytes]]:
    """The lines that begin in the range, with their ends."""
    with reading(split.location) as file:
        at = split.start
        if at:
            # The line that the byte before belongs to is the business of the range before.
            file.seek(at - 1)
            at += len(file.readline()) - 1
        first, number = at, 0
        while split.end is None or at < split.end:
            line = file.readline()
            if not line:
                return
            at += len(line)
            number += 1
            yield Where(split.location, number, first), line if first or number > 1 else without_mark(line)


def without_mark(text: bytes) -> bytes:
    """The beginning of a file without the mark that some editors put there."""
    return text.removeprefix(BYTE_ORDER_MARK)


def decode(raw: bytes, where: Where, bad: BadRecords) -> str | None:
    """The text that begins at `where`, or None where it is not UTF-8 (reported)."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if isinstance(where.number, int):
            where = Where(where.location, where.number + raw.count(b"\n", 0, error.start), where.start)
        bad.add(where, f"not UTF-8: byte 0x{raw[error.start]:02x}")
        return None
