"""Attributions as a page that a browser shows.

Enters: records with explained predictions.  Leaves: one HTML file that needs no other: no script, no
network, light and dark.  Promises: text of the records is never read as HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

MOST_RECORDS = 200
"""Records on a page; a browser gets slow with more."""
_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Attributions</title><style>
:root { color-scheme: light dark }
body { font: 16px/1.7 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
section { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding: .8rem 0 }
small { opacity: .75 }
mark { color: inherit; border-radius: .2em; padding: .1em 0 }
mark.for { background: rgb(0 150 136 / var(--a)) }
mark.against { background: rgb(230 90 20 / var(--a)); text-decoration: underline dotted }
</style></head><body><h1>Attributions</h1>
"""
_LEGEND = (
    '<p><mark class="for" style="--a:.6">speaks for</mark> <mark class="against" style="--a:.6">speaks against</mark> '
    "what is predicted; the stronger the colour, the more, within one text. Point at a word for its number.</p>\n"
)


def page(records: Iterable[tuple[Mapping[str, Any], Mapping[str, Any] | None]], *, num_records: int) -> str:
    """HTML of the first MOST_RECORDS records, each with its prediction (None: it has none)."""
    shown = min(num_records, MOST_RECORDS)
    note = f"<p>The first {shown:,} of {num_records:,} records.</p>\n" if shown < num_records else ""
    sections = [
        _section(number, fields, prediction or {})
        for number, (fields, prediction) in zip(range(1, shown + 1), records, strict=False)
    ]
    return _HEAD + _LEGEND + note + "".join(sections) + "</body></html>\n"


def _section(number: int, fields: Mapping[str, Any], prediction: Mapping[str, Any]) -> str:
    explained = "".join(_explanation(fields, one) for one in prediction.get("explanations", ()))
    return f"<section><small>Record {number}</small>\n{explained or '<p>Nothing is predicted.</p>'}</section>\n"


def _explanation(fields: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    head = (
        f"<p><strong>{escape(one['target'])}</strong> <small>score {one['score']:.3f}, of an empty text "
        f"{one['baseline_score']:.3f}, unexplained {one['convergence_delta']:.3f}</small></p>\n"
    )
    largest = max((abs(part["attribution"]) for part in one["attributions"]), default=0.0)
    texts = []
    for name in dict.fromkeys(part["field"] for part in one["attributions"]):
        parts = [part for part in one["attributions"] if part["field"] == name]
        value = fields[name]
        text = value if isinstance(value, str) else " ".join(value)
        texts.append(f"<p>{_coloured(text, parts, largest)}</p>\n")
    return head + "".join(texts)


def _coloured(text: str, parts: Sequence[Mapping[str, Any]], largest: float) -> str:
    """The text, its parts in their colours."""
    pieces, done = [], 0
    for part in parts:
        value = part["attribution"]
        strength = abs(value) / largest if largest else 0.0
        side = "for" if value >= 0 else "against"
        inner = escape(text[part["start"] : part["end"]])
        pieces.append(escape(text[done : part["start"]]))
        pieces.append(f'<mark class="{side}" style="--a:{0.8 * strength:.2f}" title="{value:+.4f}">{inner}</mark>')
        done = part["end"]
    return "".join(pieces) + escape(text[done:])
