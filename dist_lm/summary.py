"""The last lines of a run that is done.

Enters: a run folder, and what its last attempt knows.  Leaves: lines for a person.
Promises: only small files are read; figures are those of metrics.jsonl, over all attempts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dist_lm.config import RunConfig
from dist_lm.duration import spoken
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.status import status_of

if TYPE_CHECKING:
    from dist_lm.train import Outcome


def summary(config: RunConfig, outcome: Outcome) -> str:
    """A line a fact; facts that the run has not are left out."""
    run_dir = RunDir(config.run.dir)
    status = status_of(run_dir, verify=False)
    records = read_metrics(run_dir.metrics, "train")
    tokens, step = outcome.progress.tokens, outcome.progress.step
    lines = [f"done    step {step} of {config.run.steps}, {tokens:,} tokens"]
    elapsed_s = float(status.attempts[-1].get("ended_at", 0.0)) - float(status.attempts[0]["began_at"])
    lines.append(
        f"time    {spoken(elapsed_s)} since the first start, {spoken(outcome.seconds)} in this attempt, "
        f"{_rank_hours(status.attempts):.3g} rank-hours"
    )
    if outcome.resumed_step or len(status.attempts) > 1:
        lines.append(
            f"faults  {status.faults} in {len(status.attempts)} attempts, resumed at step {outcome.resumed_step}, "
            f"{status.lost_steps} steps trained again, {status.goodput:.1%} of the time was useful"
        )
    if status.skipped_steps or status.rollbacks:
        lines.append(f"        {status.skipped_steps} steps skipped, {status.rollbacks} rollbacks")
    if records:
        lines.append(f"rate    {_rate(records)}, peak memory {max(r['memory_gib'] for r in records):.2f} GiB a rank")
        lines.append(
            f"loss    {records[0]['loss']:.4f} at step {records[0]['step']}, {records[-1]['loss']:.4f} at last"
        )
    lines += [f"        held-out {name} {value:.4f}" for name, value in outcome.heldout_metrics.items()]
    if status.best:
        lines.append(f"best    {status.best['metric']} {status.best['value']:.4f} at step {status.best['step']}")
    where = str(config.run.dir)
    lines.append(f"next    dist-lm report {where}    dist-lm export {where} --out FOLDER    dist-lm tb {where}")
    return "\n".join(lines)


def _rank_hours(attempts: list[dict[str, Any]]) -> float:
    """Of all attempts, with their starts and stops: GPU-hours where ranks have GPUs."""
    return sum(
        (float(facts["ended_at"]) - float(facts["began_at"])) * int(facts["world_size"]) / 3600
        for facts in attempts
        if "ended_at" in facts
    )


def _rate(records: list[dict[str, Any]]) -> str:
    """Means over the time of the records."""
    before = [0, *(record["step"] for record in records)]
    took_s = [
        float(record["step_seconds"] * (record["step"] - start)) for record, start in zip(records, before, strict=False)
    ]

    def mean(name: str) -> float:
        weighted = (float(record.get(name, 0.0)) * each for record, each in zip(records, took_s, strict=True))
        return sum(weighted) / sum(took_s)

    told = f"{mean('tokens_per_second'):,.0f} tokens a second"
    told += f", {mean('tflops'):.3g} TFLOP/s a rank" if "tflops" in records[-1] else ""
    return told + (f", MFU {mean('mfu'):.1%}" if "mfu" in records[-1] else "")
