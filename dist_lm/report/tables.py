"""Tables of a report, which sort at a click (page.py's script).

Enters: cells.  Leaves: HTML.  Promises: every text is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Empty where there is no row."""
    heads = "".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    if not lines:
        return ""
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.5g}"
    return "" if cell is None else str(cell)
