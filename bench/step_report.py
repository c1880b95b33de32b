"""What bench/step.py found: ratios, tables, files.

Enters: for each process group the seconds of each variant's steps, by rank.  Leaves: figures and files.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import recorded

WALL, CPU = 0, 1
_PAIRS = {
    "one rank": {
        "zero0_vs_bare": ("zero0", "bare"),
        "zero1_vs_bare": ("zero1", "bare"),
        "deepspeed1_vs_bare": ("deepspeed1", "bare"),
        "bare_vs_plain_head": ("bare", "plain_head"),
        "zero1_bf16_vs_bare_bf16": ("zero1_bf16", "bare_bf16"),
        "packed_vs_padded": ("zero1_packed", "zero1"),
    },
    "two ranks": {
        "zero1_vs_ddp": ("zero1", "ddp"),
        "zero2_vs_ddp": ("zero2", "ddp"),
        "zero3_vs_ddp": ("zero3", "ddp"),
        "deepspeed2_vs_ddp": ("deepspeed2", "ddp"),
        "zero1_bf16_vs_ddp_bf16": ("zero1_bf16", "ddp_bf16"),
        "same_math_vs_hf_trainer": ("zero1", "hf_trainer"),
        "tuned_vs_hf_trainer": ("tuned", "hf_trainer"),
    },
    "two ranks, 4 micro-steps": {
        "accumulation4_zero1": ("zero1", "ddp"),
        "accumulation4_zero2": ("zero2", "ddp"),
        "accumulation4_deepspeed2": ("deepspeed2", "ddp"),
    },
    "two ranks, HF + DeepSpeed": {
        "same_math_vs_hf_deepspeed": ("zero2", "hf_deepspeed"),
        "tuned_vs_hf_deepspeed": ("tuned", "hf_deepspeed"),
    },
}


def step_seconds(result: dict[str, Any], variant: str, clock: int) -> list[float]:
    """Each step's seconds: on the clock those of the slowest rank, of the processors the mean of the ranks."""
    by_rank = [[step[clock] for step in seconds[variant]] for seconds in result["seconds"]]
    over_ranks = max if clock == WALL else statistics.fmean
    return [over_ranks(values) for values in zip(*by_rank, strict=True)]


def ratio(result: dict[str, Any], variant: str, reference: str, clock: int) -> float:
    first, second = (statistics.median(step_seconds(result, name, clock)) for name in (variant, reference))
    return first / second


def figures(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of CPU time by name, those of wall time under `wall`; the first model's, others under their names."""
    found: dict[str, Any] = {}
    for model in dict.fromkeys(result["model"] for result in results):
        own = [result for result in results if result["model"] == model]
        values = {**_ratios(own, CPU), "wall": _ratios(own, WALL)}
        found |= {model: values} if found else values
    return found


def _ratios(results: list[dict[str, Any]], clock: int) -> dict[str, float]:
    values: dict[str, float] = {}
    aa = [ratio(result, "bare_again", "bare", clock) for result in results]
    # The worst of the process groups.
    values["aa"] = max(aa, key=lambda value: abs(value - 1))
    for result in results:
        pairs = _PAIRS[result["group"].removeprefix(f"{result['model']} ")]
        measured = result["seconds"][0]
        values |= {name: ratio(result, *pair, clock) for name, pair in pairs.items() if {*pair} <= measured.keys()}
    accumulated = [values[name] for name in ("accumulation4_zero1", "accumulation4_zero2") if name in values]
    if accumulated:
        values["accumulation4"] = max(accumulated)
    return {name: round(value, 4) for name, value in values.items()}


def table(result: dict[str, Any]) -> list[str]:
    """A process group's variants: minimum and median, and medians by those of `bare`."""
    names = list(result["seconds"][0])
    steps = len(result["seconds"][0][names[0]])
    lines = [
        f"### {result['group']}",
        "",
        f"{steps} steps, {result['accumulation']} x {result['rows']} rows x {result['seq_len']} tokens a rank, "
        f"padding {' (packed: '.join(f'{share:.1%}' for share in result['padding'])})",
        "",
        "| variant | wall min ms | wall median ms | CPU min ms | CPU median ms | wall / bare | CPU / bare |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        wall, cpu = step_seconds(result, name, WALL), step_seconds(result, name, CPU)
        shown = [min(wall), statistics.median(wall), min(cpu), statistics.median(cpu)]
        ratios = [ratio(result, name, "bare", clock) for clock in (WALL, CPU)]
        cells = [*(f"{value * 1e3:.1f}" for value in shown), *(f"{value:.3f}" for value in ratios)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, ""]


def record(results: list[dict[str, Any]], found: dict[str, Any], out: Path | None) -> None:
    """Print the tables; with `out`, keep them, and the figures as JSON beside them."""
    lines = [line for result in results for line in table(result)]
    lines += ["```", json.dumps(found, indent=1), "```"]
    recorded.record("A training step", "\n".join(lines), found, out)
