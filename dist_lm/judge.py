"""How good a trained model is on records that say what is expected.

Enters: a trained model, records of any input.  Leaves: figures with confidence intervals, of all records and
of slices.  Promises: figures do not depend on the number of processes; counts are gathered, never
logits; a label that the model does not know is an error with its record number, within the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.sparse import csr_array, vstack

from dist_lm.data.input_records import InputRecord, count_input
from dist_lm.data.location import redact
from dist_lm.errors import ConfigError, DataError
from dist_lm.predict import Bad, Request, Share, chunks, divide, in_processes, open_predictor, refuse_bad, usable
from dist_lm.scores.base import Counts, MetricSet, as_rows
from dist_lm.scores.resampling import summary

_MOST_SLICES = 100
_MISSING = "(missing)"


@dataclass(frozen=True)
class Slicing:
    """Which slices to tell of, and how sure to be."""

    fields: tuple[str, ...] = ()
    """Fields of the records; each value is a slice."""
    resamples: int = 1000
    """Draws for the confidence intervals; 0: none."""
    seed: int = 0


@dataclass(frozen=True)
class _Judged:
    """One share: counts a record, its slices, and what could not be used."""

    rows: csr_array
    slices: list[tuple[str, ...]]
    bad: list[Bad]
    metrics: MetricSet


def judge_file(request: Request, slicing: Slicing) -> dict[str, Any]:
    """JSON values: model, task figures, `slices` by field and value, `classes`, bad records.

    Raises DataError and ConfigError as predict does.
    """
    shares = divide(request, count_input(request.records, request.reading))
    judged: list[_Judged] = list(in_processes(partial(_judge_share, request, slicing), shares, request.ranks))
    bad = [found for own in judged for found in own.bad]
    refuse_bad(request, bad)
    rows = vstack([own.rows for own in judged], format="csr")
    if not rows.shape[0]:
        raise DataError("no record could be used", where=redact(request.records), do="Look at the records.")
    metrics = judged[0].metrics
    draws = {"resamples": slicing.resamples, "seed": slicing.seed}
    totals = np.asarray(rows.sum(axis=0))
    report: dict[str, Any] = {
        "model": request.model,
        "input": redact(request.records),
        **summary(metrics, rows, **draws),
        "signature": metrics.signature,
        "bad_records": len(bad),
        "classes": metrics.table(totals) if metrics.additive else {},
        "confusion": metrics.confusion(totals) if metrics.additive else {},
        "slices": {},
    }
    slices = [values for own in judged for values in own.slices]
    for place, name in enumerate(slicing.fields):
        values = np.array([own[place] for own in slices])
        found = sorted(set(values.tolist()))
        if len(found) > _MOST_SLICES:
            raise ConfigError(
                f"field '{name}' has {len(found)} values, and {_MOST_SLICES} make slices",
                where="--slice-by",
                do="Name a field that puts the records into a few groups.",
            )
        report["slices"][name] = {
            value: summary(metrics, rows[np.flatnonzero(values == value)], **draws) for value in found
        }
    return report


def _judge_share(request: Request, slicing: Slicing, share: Share) -> _Judged:
    predictor = open_predictor(request, share)
    metrics = predictor.metric_set()
    counts: list[Counts] = []
    slices: list[tuple[str, ...]] = []
    all_bad: list[Bad] = []
    foresees = predictor.foresees

    def clean(line: InputRecord) -> tuple[Any, Any]:
        fields = request.fields_of(line)
        expected = predictor.expected(fields)
        return expected if foresees else predictor.clean(fields), expected

    for lines in chunks(request, share):
        cleaned, bad = usable(lines, clean)
        all_bad += bad
        given = [pair[0] for pair in cleaned.values()]
        predictions = predictor.judge(given) if foresees else predictor.predict(given)
        for (place, (_, expected)), prediction in zip(cleaned.items(), predictions, strict=True):
            counts.append(predictor.counts(metrics, prediction, expected))
            slices.append(tuple(str(lines[place].fields.get(name, _MISSING)) for name in slicing.fields))
    return _Judged(as_rows(counts, metrics.width), slices, all_bad, metrics)


def report_lines(report: dict[str, Any]) -> list[str]:
    """The report for people."""
    lines = [f"{report['records']} records of {report['input']}, {report['bad_records']} bad"]
    lines += _figure_lines(report, "")
    if report["signature"]:
        lines.append(f"  signature: {report['signature']}")
    for name, figures in report["classes"].items():
        shown = "  ".join(f"{figure} {value:.4f}" for figure, value in figures.items() if figure != "count")
        lines.append(f"  {name:20} {shown}  count {figures['count']:.0f}")
    for field, values in report["slices"].items():
        for value, part in values.items():
            lines.append(f"{field} = {value}: {part['records']} records")
            lines += _figure_lines(part, "  ")
    return lines


def _figure_lines(part: dict[str, Any], indent: str) -> Sequence[str]:
    lines = []
    for name, value in part["figures"].items():
        bounds = part["intervals"].get(name)
        shown = f"  [{bounds[0]:.4f}, {bounds[1]:.4f}]" if bounds else ""
        lines.append(f"{indent}  {name:20} {value:.4f}{shown}")
    return lines
