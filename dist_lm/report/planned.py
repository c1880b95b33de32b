"""Memory that a run was to need, to stand beside what it took.

Enters: a run folder whose data can be read from here.  Leaves: GiB of a rank by what they are for.
Promises: nothing is trained and nothing is written; a plan that cannot be made says why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import yaml

from dist_lm.accelerators import CPU, known_as
from dist_lm.config import RunConfig
from dist_lm.errors import DistLMError
from dist_lm.run_dir import RunDir


@dataclass(frozen=True)
class PlannedMemory:
    """Of the fullest rank, in GiB."""

    states: float
    activations: float
    buffers: float
    total: float
    why: str = ""
    """Why there is no plan; then the others are 0."""


def planned_memory(run_dir: RunDir) -> PlannedMemory:
    """By `dist-lm plan` for the ranks and devices of the last attempt."""
    try:
        return _planned(run_dir)
    except (DistLMError, OSError, KeyError, ValueError) as error:
        return PlannedMemory(0.0, 0.0, 0.0, 0.0, f"{error}".splitlines()[0])


def _planned(run_dir: RunDir) -> PlannedMemory:
    from dist_lm.plan.machine import machine_of
    from dist_lm.plan.plan import Options, make_plan

    config = RunConfig.model_validate(yaml.safe_load(run_dir.config.read_text()))
    ranks = int(run_dir.attempt_facts(run_dir.next_attempt() - 1)["world_size"])
    device = json.loads((run_dir.path / "env.json").read_text())["device"]
    accelerator = None if device == CPU else known_as(device)
    if device != CPU and accelerator is None:
        raise ValueError(f"the memory of {device} is not known")
    machine = machine_of(accelerator.name if accelerator else CPU, ranks, config.precision)
    plan = make_plan(config, machine, Options())
    stage = plan.stage(plan.configured)
    return PlannedMemory(stage.states_gib, stage.activations_gib, stage.buffers_gib, stage.total_gib)
