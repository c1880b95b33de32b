"""The `ray:` section: what a run asks of a Ray cluster.

Enters: plain values.  Leaves: a RaySection.
Promises: it is about machines only; what is computed is the same for every value.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from dist_lm.config_section import Section, refuse


def _or_a_number(schema: dict[str, Any]) -> None:
    schema["anyOf"].append({"type": "integer", "minimum": 1})


class WorkerRange(Section):
    """How many workers: in YAML one number, or `{min: 4, max: 16}`."""

    min: PositiveInt
    """Fewest workers that the run may go on with."""
    max: PositiveInt
    """Most workers that the run grows to."""

    @model_validator(mode="before")
    @classmethod
    def _one_number(cls, given: Any) -> Any:
        if isinstance(given, int) and not isinstance(given, bool):
            return {"min": given, "max": given}
        if not isinstance(given, dict | WorkerRange):
            refuse([(f"ray.workers `{given}` is neither a number nor {{min: N, max: N}}", ("ray.workers",))])
        return given

    @model_validator(mode="after")
    def _in_order(self) -> WorkerRange:
        if self.min > self.max:
            refuse([(f"ray.workers.min {self.min} is more than ray.workers.max {self.max}", ("ray.workers",))])
        return self


class RaySection(Section):
    """What the run asks of a Ray cluster; without effect under other launchers."""

    workers: WorkerRange | None = Field(default=None, json_schema_extra=_or_a_number)
    """Workers, one for each accelerator (or CPU): a number, or {min, max} to shrink and grow with the cluster.
    Empty: all that the cluster has at the start."""
    accelerator_type: str | None = None
    """Only GPUs of this type, such as A100 (Ray's name)."""
    resources_per_worker: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Resources that a worker takes; empty: {GPU: 1} where the cluster has GPUs, else {CPU: 1}."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """PACK: on few nodes; SPREAD: on many; STRICT_: only so."""
    label_selector: dict[str, str] = Field(default_factory=dict)
    """Labels that a node must have, such as {market: spot}."""
    resize_s: PositiveFloat = 60.0
    """With {min, max}: seconds between two looks for nodes that came; growing costs a restart."""
    spare_workers: bool = True
    """Keep processes in waiting that have imported everything, as many as a node may have workers: a restart is
    seconds faster for it. Each takes about 450 MB of its node's memory."""
