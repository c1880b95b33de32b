"""A report of runs as one page that a browser shows.

Enters: RunFacts.  Leaves: one HTML file that needs no other: no network, light and dark, wide and
narrow.  Promises: nothing that a run wrote is read as HTML.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import dist_lm
from dist_lm.report import evaluations
from dist_lm.report.curves import COLOURS, Curve, plot
from dist_lm.report.run_facts import RunFacts
from dist_lm.report.tables import table

_STYLE = """
:root { color-scheme: light dark; --lightness: 30% }
@media (prefers-color-scheme: dark) { :root { --lightness: 62% } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 1rem auto; padding: 0 1rem;
  overflow-wrap: anywhere }
h2 { border-top: 1px solid color-mix(in srgb, currentColor 25%, transparent); padding-top: .8rem }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto; overflow: visible }
svg text { font-size: 12px; fill: currentColor } @media (max-width: 36rem) { svg text { font-size: 18px } }
polyline { fill: none; stroke-width: 1.6 }
.grid { stroke: currentColor; opacity: .15 } .mark { stroke-width: 1.5; stroke-dasharray: 2 3 }
.dashed { stroke-dasharray: 6 3 }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; overflow-wrap: break-word }
th button { all: unset; cursor: pointer; font-weight: 600; text-decoration: underline dotted }
th button:focus-visible { outline: 2px solid currentColor }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
tr + tr td { border-top: 1px solid color-mix(in srgb, currentColor 15%, transparent) }
svg [class*=c] { stroke: var(--hue) } circle { fill: var(--hue) } i { background: var(--hue) } b { color: var(--hue) }
.confusion td { text-align: right; padding: .2rem .6rem; background: hsl(210 70% 50% / calc(var(--share, 0%) * .6)) }
.confusion th { padding: .2rem .6rem } .confusion caption { text-align: left; font-weight: 600 }
.bar { height: 1.2rem; display: flex } .bar i { display: block } small { opacity: .75 }
"""
_HUES = (210, 20, 140, 280, 50, 330, 180)
_COLOURS = "\n".join(
    f".c{number}, .k{number} {{ --hue: hsl({hue} 70% var(--lightness)) }}"
    for number, hue in zip(range(COLOURS), _HUES, strict=True)
)
_SCRIPT = """
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => {
  const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
  const down = head.getAttribute("aria-sort") === "ascending";
  for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = row => row.cells[column].textContent;
  const number = row => text(row) ? Number(text(row).replace(/[,%]/g, "")) : NaN;
  const order = (a, b) => {
    const words = [a, b].map(row => Number.isNaN(number(row)));
    if (words[0] && words[1]) return text(a).localeCompare(text(b));
    return words[0] - words[1] || number(a) - number(b);
  };
  body.append(...[...body.rows].sort((a, b) => down ? order(b, a) : order(a, b)));
});
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_PERFORMANCE = {
    "tokens_per_second": "Tokens a second",
    "mfu": "MFU: share of the device's peak",
    "tflops": "TFLOP/s of a rank",
    "step_seconds": "Seconds a step",
    "data_seconds": "Seconds of waiting for data, a step",
    "memory_gib": "Peak memory of a rank, GiB",
    "padding_share": "Share of padding",
}
_STEERING = {"learning_rate": "Learning rate", "grad_norm": "Gradient norm", "loss_scale": "Loss scale"}


def page(runs: Sequence[RunFacts], judged: Sequence[evaluations.Judged] = ()) -> str:
    """HTML of one run, or of several side by side, and of evaluations that `dist-lm eval` wrote."""
    title = ", ".join(run.name for run in runs)
    sections = [
        ("Runs", _summary(runs) + _legend(runs)),
        ("Loss and evaluation", _plots(runs, _quality_names(runs))),
        ("Learning rate and gradient", _plots(runs, [("train", name, words) for name, words in _STEERING.items()])),
        ("Throughput", _plots(runs, [("train", name, words) for name, words in _PERFORMANCE.items()])),
        ("Where the time of a step went", "".join(_time_bar(run) for run in runs)),
        ("Data: epochs by source", _last_values(runs, "train", "epoch")),
        ("Memory of a rank, GiB", _memory(runs)),
        ("Last evaluation", _last_values(runs, "eval", "") + evaluations.of_runs(runs)),
        ("Evaluations", evaluations.of_files(judged)),
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
    words = "Dashed: held-out data. Dotted: a fault, a rollback, a skipped step or another event; point at it."
    return f"<p>{names} <small>{words}</small></p>"


def _quality_names(runs: Sequence[RunFacts]) -> list[tuple[str, str, str]]:
    """Losses and accuracies of training, each with that of the held-out data, then other held-out figures."""
    trained = dict.fromkeys(
        name for run in runs for name in run.names("train") if name == "loss" or name.endswith(("_loss", "_accuracy"))
    )
    heldout = dict.fromkeys(name for run in runs for name in run.names("eval") if name not in trained)
    losses = [name for name in trained if name.endswith("_loss")]
    if len(losses) == 1:
        # The only objective: its loss is `loss`.
        del trained[losses[0]]
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
    counted = table(
        ("run", "event", "times"), [(run.name, *each) for run in runs for each in sorted(run.events.items())]
    )
    told = table(("run", "step", "what happened"), [(run.name, int(step), w) for run in runs for step, w in run.marks])
    return counted + (f"<details><summary>One by one</summary>{told}</details>" if told else "")


def _memory(runs: Sequence[RunFacts]) -> str:
    """What was planned beside the most that a rank took."""
    head = ("run", "states", "activations", "buffers and libraries", "planned", "measured")
    rows: list[tuple[str | float | None, ...]] = []
    reasons: list[str] = []
    for run in runs:
        measured = max((value for _, value in run.points("train", "memory_gib")), default=None)
        planned = run.planned
        if planned is None or planned.why:
            rows.append((run.name, None, None, None, None, measured))
            reasons += [f"<p>{escape(run.name)}: no plan: {escape(planned.why)}</p>"] if planned else []
        else:
            parts = (planned.states, planned.activations, planned.buffers, planned.total)
            rows.append((run.name, *parts, measured))
    shown = [row for row in rows if row[-1] is not None or row[-2] is not None]
    return table(head, shown) + "".join(reasons)


def _configuration(runs: Sequence[RunFacts]) -> str:
    """Every key with where it comes from; those in which the runs differ stand first."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [(key, *(str(run.config.get(key, "absent")) for run in runs)) for key in keys]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    shown = f"<h3>Different</h3>{table(('key', *(run.name for run in runs)), differing)}" if differing else ""
    head = ["key", *(words for run in runs for words in (run.name if len(runs) > 1 else "value", "where from"))]
    full = [
        (row[0], *(cell for run, value in zip(runs, row[1:], strict=True) for cell in (value, run.origin(row[0]))))
        for row in rows
    ]
    return f"{shown}<details><summary>All {len(rows)} keys</summary>{table(head, full)}</details>" if rows else ""
