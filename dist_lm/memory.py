"""Out of memory: what was needed, what to change, and the micro-batch that the next attempt takes.

Enters: an error of the allocator.  Leaves: OutOfMemory with numbers and options; with `batch.micro:
auto`, a mark in the run folder, by which the next attempt takes half of the micro-batch.
Promises: the global batch, and with it what is computed, stays the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dist_lm.config import RunConfig
from dist_lm.errors import DistLMError, OutOfMemory
from dist_lm.run_dir import RunDir

if TYPE_CHECKING:
    from dist_lm.assemble import Parts

AUTO_MOST_ROWS = 64
"""`auto` begins here: more rows a pass make no step faster on the devices of today."""
_WORDS = ("out of memory", "can't allocate memory", "not enough memory")


class OutOfMemoryRetry(OutOfMemory):
    """Out of memory with a micro-batch that dist_lm chose itself: the next attempt takes half of it."""

    restart_helps = True


def chosen_micro_rows(config: RunConfig, run_dir: RunDir) -> int:
    """Rows of one forward pass: what the configuration says, or what has not yet failed."""
    if config.batch.micro_rows != "auto":
        return config.batch.micro_rows
    return max(1, min([AUTO_MOST_ROWS, config.batch.global_rows, *(rows // 2 for rows in run_dir.too_large())]))


@contextlib.contextmanager
def explained(parts: Parts, step: int) -> Iterator[None]:
    """Turn an allocator's error into OutOfMemory; any other passes."""
    try:
        yield
    except DistLMError:
        raise
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError, and so is what the CPU allocator raises.
        if not isinstance(error, MemoryError) and not any(word in str(error).lower() for word in _WORDS):
            raise
        raise _told(parts, step, str(error)) from error


def _told(parts: Parts, step: int, why: str) -> OutOfMemory:
    rows, auto = parts.plan.rows_per_micro, parts.config.batch.micro_rows == "auto"
    what = f"rank {parts.ranks.rank} is out of memory at step {step} with a micro-batch of {rows} rows"
    facts = f"{why.splitlines()[0]}\nZeRO-{parts.engine.stage}, {parts.config.precision}, {parts.ranks.device.type}"
    where = str(parts.run_dir.path)
    if auto and rows > 1:
        parts.run_dir.mark_too_large(rows)
        return OutOfMemoryRetry(what, where=where, why=facts, do=f"The next attempt takes {rows // 2} rows.")
    smaller = f"Set batch.micro to {rows // 2}. " if rows > 1 else ""
    options = f"{smaller}Or raise zero, use precision=bf16, or offload (ds_configs/zero3_offload.json)."
    return OutOfMemory(what, where=where, why=facts, do=options)
