"""The `run` and `batch` sections: how long, how large, how often, and what happens when something fails.

Enters: plain values.  Leaves: frozen sections.  Promises: a length of time that exists can be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from pydantic_core import PydanticCustomError

from dist_lm.config_section import Section, Seed
from dist_lm.duration import DURATION

Duration = Annotated[str, Field(pattern=DURATION)]
"""A length of time such as 90s, 15min or 11h30min."""


def _in_words(words: str) -> WrapValidator:
    """One message where Pydantic would have one for each type that was tried."""

    def check(value: Any, inner: ValidatorFunctionWrapHandler) -> Any:
        try:
            return inner(value)
        except ValidationError as error:
            raise PydanticCustomError("either", "{words}", {"words": words}) from error

    return WrapValidator(check)


class BestSection(Section):
    metric: str = "loss"
    """Held-out figure that decides which checkpoint is the best."""
    mode: Literal["auto", "min", "max"] = "auto"
    """Whether less or more is better; auto: less of a loss or perplexity, more of anything else."""


class EarlyStopSection(BestSection):
    patience: PositiveInt = 3
    """Evaluations without improvement after which the run ends."""
    min_delta: NonNegativeFloat = 0.0
    """An improvement is more than this."""


class RunSection(Section):
    dir: Path
    """Folder of this run: checkpoints, metrics, logs.  The same folder goes on where it was."""
    steps: PositiveInt
    """Optimizer updates in the whole run."""
    seed: Seed = 0
    """Decides weights, data order, masks and dropout."""
    log_every: PositiveInt = 10
    """Steps between two metric records."""
    peak_tflops: PositiveFloat | None = None
    """What one device can do in the run's precision, in TFLOP/s; MFU is a share of it.  Without it, what the
    data sheet of a known accelerator says; on a CPU no MFU is told."""
    eval_every: NonNegativeInt = 0
    """Steps between two evaluations; 0: only at the end."""
    save_every: Annotated[PositiveInt | Duration, _in_words("should be a number of steps, or a time such as 15min")] = (
        500
    )
    """Steps between two checkpoints, or a time such as 15min.  The last step is always saved."""
    keep: PositiveInt = 3
    """Newest checkpoints kept; older ones are removed once a newer one is published."""
    keep_every: NonNegativeInt = 0
    """Checkpoints of a step that is a multiple of this are kept, too; 0: none."""
    checkpoints: str | None = None
    """Where checkpoints lie, such as s3://bucket/run; without it, in the run folder."""
    local_copies: str | None = None
    """Folder on each machine, in memory (/dev/shm/copies) or on its own disk, that keeps a copy of the
    newest checkpoint's files: those of its ranks, and those of the machine before it.  A restart reads
    them instead of `checkpoints`.  Variables are replaced: $SLURM_TMPDIR."""
    save_retries: Annotated[int, Field(ge=0, le=4)] = 4
    """How often a failed write is tried again, after 0.5, 2, 8 and 30 s, before the run ends."""
    best: BestSection | None = None
    """Mark and keep the checkpoint with the best held-out figure."""
    early_stop: EarlyStopSection | None = None
    """End the run when a held-out figure no longer improves."""
    time_limit: Duration | None = None
    """Stop, with a checkpoint, this long after the attempt began, such as 11h30min."""
    stop_budget_s: PositiveFloat = 120.0
    """A rank that is still there this long after a stop request ends without a checkpoint."""
    stall_limit_s: PositiveFloat = 300.0
    """Least time without progress that counts as a stall; five times the longest seen counts, too."""
    bad_steps: PositiveInt = 3
    """Bad steps in a row after which the run goes back to a checkpoint and skips their data."""
    spike_mads: NonNegativeFloat = 0.0
    """A loss this many median deviations above the recent median is a bad step; 0: only a loss or
    gradient that is not finite is one."""
    max_rollbacks: NonNegativeInt = 2
    """Rollbacks in the whole run; one more ends it."""
    allow_change: tuple[str, ...] = ()
    """Dotted keys that may differ from those the run folder was begun with."""


class BatchSection(Section):
    global_rows: PositiveInt = Field(alias="global")
    """Rows that all ranks together train on in one step."""
    micro_rows: Annotated[
        PositiveInt | Literal["auto"], _in_words("should be a number of rows, 1 or more, or auto")
    ] = Field(alias="micro")
    """Most rows that one rank sends through one forward pass; auto: as many as fit into memory."""
