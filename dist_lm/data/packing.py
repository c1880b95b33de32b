"""Which items share a row: best-fit decreasing.

Enters: sizes, and what a row holds.  Leaves: rows of items.
Promises: every item stands in one row, and no row holds more than it can; a function of the sizes alone.
Without all the items of some rows, those of the others share rows as before.

Source: Johnson 1973, Near-Optimal Bin Packing Algorithms; as good as first-fit decreasing, and faster.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping


def best_fit(sizes: Mapping[int, int], capacity: int) -> list[list[int]]:
    """Items by number as rows that hold up to `capacity`; rows in the order of their first item.

    Longest first, ties by number; each into the row with the least room that is enough.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for item in sorted(sizes, key=lambda item: (-sizes[item], item)):
        at = bisect_left(room, (sizes[item], -1))
        if at == len(room):
            rows.append([])
            left, row = capacity, len(rows) - 1
        else:
            left, row = room.pop(at)
        rows[row].append(item)
        insort(room, (left - sizes[item], row))
    return sorted(sorted(row) for row in rows)
