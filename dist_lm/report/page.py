"""A report of runs as one page that a browser shows.

Enters: RunFacts.  Leaves: one HTML file that needs no other: no network, light and dark, wide and
narrow.  Promises: nothing that a run wrote is read as HTML.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import dist_lm
from dist_lm.report.curves import COLOURS, Curve, plot
from dist_lm.report.run_facts import RunFacts

_STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 1rem auto; padding: 0 1rem }
h2 { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding-top: .8rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto }
svg text { font-size: 11px; fill: currentColor } polyline { fill: none; stroke-width: 1.6 }
.grid { stroke: currentColor; opacity: .15 } .mark { stroke-width: 1.5; stroke-dasharray: 2 3 }
.dashed { stroke-dasharray: 6 3 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; overflow-wrap: anywhere }
th button { all: unset; cursor: pointer; font-weight: 600; text-decoration: underline dotted }
tr + tr td { border-top: 1px solid color-mix(in srgb, currentColor 15%, transparent) }
.bar { height: 1.2rem; display: flex } .bar i { display: block } small { opacity: .75 }
"""
_HUES = (210, 20, 140, 280, 50, 330)
_COLOURS = "\n".join(
    f".c{number} {{ stroke: hsl({hue} 70% 50%) }} circle.c{number}, i.c{number} {{ fill: hsl({hue} 70% 50%); "
    f"background: hsl({hue} 70% 50%) }} .k{number} {{ color: hsl({hue} 70% 50%) }}"
    for number, hue in zip(range(COLOURS), _HUES, strict=True)
)
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = row => row.cells[column].textContent.replaceAll(",", "");
  const order = (a, b) => {
    const numbers = [parseFloat(key(a)), parseFloat(key(b))];
    return numbers.some(Number.isNaN) ? key(a).localeCompare(key(b)) : numbers[0] - numbers[1];
  };
  body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
});
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PERFORMANCE = {
    "tokens_per_second": "Tokens a second",
    "step_seconds": "Seconds a step",
    "data_seconds": "Seconds of waiting for data, a step",
    "memory_gib": "Peak memory of a rank, GiB",
    "padding_share": "Share of padding",
}
_STEERING = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "loss_scale": "Loss scale"}


def page(runs: Sequence[RunFacts]) -> str:
    """HTML of one run, or of several side by side."""
    title = ", ".join(run.name for run in runs)
    sections = [
        ("Runs", _summary(runs) + _legend(runs)),
        ("Loss and evaluation", _plots(runs, _quality_names(runs))),
        ("Learning rate and gradient", _plots(runs, [("train", name, words) for name, words in _STEERING.items()])),
        ("Throughput", _plots(runs, [("train", name, words) for name, words in _PERFORMANCE.items()])),
        ("Where the time of a step went", "".join(_time_bar(run) for run in runs)),
        ("Data: epochs by source", _last_values(runs, "train", "epoch")),
        ("Last evaluation", _last_values(runs, "eval", "")),
        ("Attempts", _attempts(runs)),
        ("Events", _events(runs)),
        ("Configuration", _configuration(runs)),
    ]
    body = "".join(f"<section><h2>{name}</h2>{content}</section>\n" for name, content in sections if content)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><meta http-equiv="Content-Security-Policy" '
        f'content="{_POLICY}"><title>{escape(title)}</title><style>{_STYLE}{_COLOURS}</style></head>\n'
        f"<body><h1>{escape(title)}</h1><small>dist_lm {escape(dist_lm.__version__)}</small>\n{body}"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table whose columns sort at a click."""
    heads = "".join(f'<th scope="col"><button>{escape(name)}</button></th>' for name in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(_text(cell))}</td>" for cell in row) + "</tr>" for row in rows)
    if not lines:
        return ""
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'


def _text(cell: Any) -> str:
    if isinstance(cell, float):
        return f"{cell:.5g}"
    return "" if cell is None else str(cell)


def _summary(runs: Sequence[RunFacts]) -> str:
    head = ("run", "state", "step", "of", "attempts", "faults", "lost steps", "skipped", "rollbacks", "goodput")
    rows = []
    for run in runs:
        status = run.status
        counts = (status.faults, status.lost_steps, status.skipped_steps, status.rollbacks)
        rows.append(
            (run.name, status.state, status.step, status.steps, len(status.attempts), *counts, f"{status.goodput:.1%}")
        )
    best = [
        f"<p>{escape(run.name)}: best {escape(str(run.status.best['metric']))} {run.status.best['value']:.4f} at step "
        f"{run.status.best['step']}</p>"
        for run in runs
        if run.status.best
    ]
    return table(head, rows) + "".join(best)


def _legend(runs: Sequence[RunFacts]) -> str:
    names = " ".join(f'<b class="k{number % COLOURS}">{escape(run.name)}</b>' for number, run in enumerate(runs))
    words = "Dashed: held-out data. Dotted: a fault, a rollback or a skipped step; point at it."
    return f"<p>{names} <small>{words}</small></p>"


def _quality_names(runs: Sequence[RunFacts]) -> list[tuple[str, str, str]]:
    """Losses and accuracies of training, each with that of the held-out data, then other held-out figures."""
    trained = dict.fromkeys(
        name for run in runs for name in run.names("train") if name == "loss" or name.endswith(("_loss", "_accuracy"))
    )
    heldout = dict.fromkeys(name for run in runs for name in run.names("eval") if name not in trained)
    return [("both", name, name) for name in trained] + [("eval", name, name) for name in heldout]


def _plots(runs: Sequence[RunFacts], wanted: Sequence[tuple[str, str, str]]) -> str:
    marks = [(step, f"{run.name}: {words}", number) for number, run in enumerate(runs) for step, words in run.marks]
    figures = []
    for kind, name, title in wanted:
        curves = [
            Curve(f"{run.name} ({each})", run.points(each, name), number, dashed=each == "eval")
            for number, run in enumerate(runs)
            for each in (("train", "eval") if kind == "both" else (kind,))
        ]
        figures.append(plot(title, curves, marks))
    content = "".join(figures)
    return f'<div class="plots">{content}</div>' if content else ""


def _time_bar(run: RunFacts) -> str:
    shares = run.where_time_went()
    bars = "".join(
        f'<i class="c{number % COLOURS}" style="width:{share:.2%}" title="{escape(words)} {share:.1%}"></i>'
        for number, (words, share) in enumerate(shares.items())
    )
    words = ", ".join(
        f'<b class="k{number % COLOURS}">{escape(words)}</b> {share:.1%}'
        for number, (words, share) in enumerate(shares.items())
    )
    return f'<p>{escape(run.name)}</p><div class="bar">{bars}</div><p>{words}</p>' if shares else ""


def _last_values(runs: Sequence[RunFacts], kind: str, prefix: str) -> str:
    names = dict.fromkeys(name for run in runs for name in run.names(kind) if name.startswith(prefix))
    rows = [(name, *(points[-1][1] if (points := run.points(kind, name)) else None for run in runs)) for name in names]
    return table(("figure", *(run.name for run in runs)), rows)


def _attempts(runs: Sequence[RunFacts]) -> str:
    head = ("run", "attempt", "launcher", "ranks", "from step", "to step", "seconds", "how it ended", "what")
    rows = []
    for run in runs:
        for facts in run.status.attempts:
            seconds = float(facts["ended_at"]) - float(facts["began_at"]) if "ended_at" in facts else None
            place = (facts.get("launcher"), facts.get("world_size"), facts.get("from_step"), facts.get("step"))
            told = (facts.get("reason", "running"), str(facts.get("what", ""))[:300])
            rows.append((run.name, facts["attempt"], *place, seconds, *told))
    return table(head, rows)


def _events(runs: Sequence[RunFacts]) -> str:
    return table(("run", "event", "times"), [(run.name, *item) for run in runs for item in sorted(run.events.items())])


def _configuration(runs: Sequence[RunFacts]) -> str:
    """Every key; those in which the runs differ stand first."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, *(str(run.config.get(key, "absent")) for run in runs)) for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    head = ("key", *(run.name for run in runs))
    shown = f"<h3>Different</h3>{table(head, differing)}" if differing else ""
    return f"{shown}<details><summary>All {len(rows)} keys</summary>{table(head, rows)}</details>" if rows else ""
