"""Evaluations of a report: figures with intervals, classes or entity types, who is taken for whom.

Enters: the last evaluation of each run, and what `dist-lm eval --out` wrote.  Leaves: HTML.
Promises: every text is escaped; the darker a field of a confusion matrix, the larger its share of the row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from dist_lm.errors import DataError
from dist_lm.report.run_facts import RunFacts
from dist_lm.report.tables import table

Judged = dict[str, Any]


def read_evaluation(path: Path) -> Judged:
    """Raises DataError where it is not what `dist-lm eval --out` wrote."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict) or not {"model", "input", "records", "figures"} <= set(found):
            raise ValueError("it has no figures of records")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is no evaluation", where="--evaluation", why=str(error), do="Name a file of `dist-lm eval --out`."
        ) from error
    return found


def of_runs(runs: Sequence[RunFacts]) -> str:
    """Classes and confusion of the last evaluation of each run; the figures stand in a table of their own."""
    parts = []
    for run in runs:
        last = run.evaluations[-1] if run.evaluations else {}
        for name, tables in last.get("tables", {}).items():
            where = f"{run.name}{f', {name}' if name else ''}, step {last['step']}"
            parts.append(f"<h3>{escape(where)}</h3>{_classes(tables)}{_confusion(tables)}")
    return "".join(parts)


def of_files(judged: Sequence[Judged]) -> str:
    """Each evaluation of `dist-lm eval`."""
    parts = []
    for one in judged:
        bounds = one.get("intervals", {})
        rows = [(name, value, *bounds.get(name, (None, None))) for name, value in one["figures"].items()]
        signature = f"<p><small>{escape(str(one['signature']))}</small></p>" if one.get("signature") else ""
        parts.append(
            f"<h3>{escape(str(one['model']))} on {escape(str(one['input']))}</h3>"
            f"<p>{one['records']} records, {one.get('bad_records', 0)} bad</p>"
            + table(("figure", "value", "from", "to (95 %)"), rows)
            + signature
            + _classes(one)
            + _confusion(one)
            + _slices(one)
        )
    return "".join(parts)


def _classes(tables: Mapping[str, Any]) -> str:
    classes: Mapping[str, Mapping[str, float]] = tables.get("classes", {})
    if not classes:
        return ""
    columns = list(dict.fromkeys(name for row in classes.values() for name in row))
    rows = [(name, *(row.get(column) for column in columns)) for name, row in classes.items()]
    return table(("class", *columns), rows)


def _slices(one: Judged) -> str:
    rows = [
        (f"{field} = {value}", part["records"], *(part["figures"].get(name) for name in one["figures"]))
        for field, values in one.get("slices", {}).items()
        for value, part in values.items()
    ]
    return table(("slice", "records", *one["figures"]), rows)


def _confusion(tables: Mapping[str, Any]) -> str:
    """A row an expected class, a column a predicted one."""
    confusion: Mapping[str, Mapping[str, float]] = tables.get("confusion", {})
    if not confusion:
        return ""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in confusion)
    lines = []
    for name, row in confusion.items():
        count = sum(row.values()) or 1.0
        cells = "".join(f'<td style="--share:{row[other] / count:.1%}">{row[other]:.0f}</td>' for other in confusion)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        '<div class="scroll"><table class="confusion"><caption>Records: a row an expected class, a column a predicted '
        f"one</caption><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )
