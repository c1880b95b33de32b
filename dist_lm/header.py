"""What a run will do, in the first lines that it says.

Enters: the parts of a run that is ready for its first step.  Leaves: lines for a person.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

import dist_lm
from dist_lm.config import RunSection

if TYPE_CHECKING:
    from dist_lm.assemble import Parts


def title(parts: Parts) -> str:
    """Task, devices and attempt."""
    ranks = parts.ranks
    return f"{parts.config.task.name}  {ranks.world_size} x {device_name(ranks.device)}  attempt {parts.attempt.number}"


def header(parts: Parts, *, num_parameters: int, launcher: str) -> str:
    """Model and devices, folder, data, batch, and what happens at which step."""
    config, engine, data, plan = parts.config, parts.engine, parts.data, parts.plan
    num_shards = sum(len(source.view.manifest.shards) for source in data.sources)
    sources = f" of {len(data.sources)} sources" if len(data.sources) > 1 else ""
    epochs = data.epochs(config.run.steps * plan.global_rows)
    readers = "ranks" if parts.mesh.parts == 1 else f"groups of {parts.mesh.parts} ranks"
    even = plan.world_size * plan.micro_steps * plan.rows_per_micro == plan.global_rows
    return "\n".join(
        [
            f"dist_lm {dist_lm.__version__}  {title(parts)}  {num_parameters / 1e6:.1f}M parameters  "
            f"ZeRO-{engine.stage} {config.precision}  by {launcher}",
            f"run     {config.run.dir}",
            f"data    {data.num_rows} rows of up to {data.view.seq_len} tokens in {num_shards} shards{sources}",
            "        " + ", ".join(f"{name.replace('epoch', 'epochs')} {value:.1f}" for name, value in epochs.items()),
            f"batch   global {plan.global_rows} = {plan.world_size} {readers} x {plan.micro_steps} micro-steps x "
            f"{plan.rows_per_micro} rows{'' if even else ' (some empty)'}",
            f"steps   {config.run.steps}, a record every {config.run.log_every}, "
            f"{_evaluations(config.run, list(config.data.heldout_sets.values()))}",
            f"saves   {_saves(config.run)}",
        ]
    )


def _evaluations(run: RunSection, heldout: list[str]) -> str:
    if not heldout:
        return "no held-out data"
    sets = "held-out data" if len(heldout) == 1 else f"{len(heldout)} held-out sets"
    at = f"every {run.eval_every} and at the end" if run.eval_every else "at the end"
    early = run.early_stop
    until = f"; ends after {early.patience} evaluations in which {early.metric} is no better" if early else ""
    return f"{sets} evaluated {at}{until}"


def _saves(run: RunSection) -> str:
    every = run.save_every if isinstance(run.save_every, str) else f"{run.save_every} steps"
    kept = f"the newest {run.keep} are kept" + (f", and every {run.keep_every}" if run.keep_every else "")
    best = f", and the best by {run.best.metric}" if run.best else ""
    limit = f"; stops by itself after {run.time_limit}" if run.time_limit else ""
    return f"every {every} and at the end, {kept}{best}{limit}"


def device_name(device: torch.device) -> str:
    """`cpu`, or the name that the driver gives a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
