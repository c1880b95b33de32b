"""What a run measured: sums over ranks, rates, and where they are written.

Enters: sums and counts of each step.  Leaves: metrics.jsonl and TensorBoard scalars.
Promises: an average is a sum over targets divided by their number; after a resume there is one
point a step, those of the steps that were lost are removed.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm import disk

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dist_lm.ranks import Ranks

log = logging.getLogger(__name__)


def averages(sums: Mapping[str, float], targets: Mapping[str, float]) -> dict[str, float]:
    """`loss` (all objectives added up), and of each objective its loss, and its accuracy if it has one."""
    values = {"loss": 0.0}
    for name, count in targets.items():
        count = max(count, 1.0)
        values[f"{name}_loss"] = sums[f"{name}_loss"] / count
        if f"{name}_correct" in sums:
            values[f"{name}_accuracy"] = sums[f"{name}_correct"] / count
        values["loss"] += values[f"{name}_loss"]
    return values


class Window:
    """Steps since the last record.  Tensors are read once, at the end of the window."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._sums: dict[str, Tensor] = {}
        self._host: dict[str, float] = {}
        self._targets: dict[str, float] = {}
        self.num_steps = 0
        self._opened_at = clock()

    def add(self, sums: Mapping[str, Tensor], targets: Mapping[str, float], **host: float) -> None:
        """One step: this rank's sums, global targets, and this rank's seconds and tokens."""
        for name, value in sums.items():
            # float64: sums of many steps would lose digits that a comparison of runs needs.
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        for name, count in targets.items():
            self._targets[name] = self._targets.get(name, 0.0) + count
        self.add_seconds(**host)
        self.num_steps += 1

    def add_seconds(self, **host: float) -> None:
        """Host figures that belong to the window and not to one step, such as checkpointing."""
        for name, value in host.items():
            self._host[name] = self._host.get(name, 0.0) + value

    def reduce(self, ranks: Ranks) -> dict[str, float]:
        """Averages over ranks and steps, then begin anew; a collective call."""
        import torch

        names = sorted(self._sums)
        host_names = sorted(self._host)
        local = torch.stack([self._sums[name] for name in names]).tolist() if names else []
        totals = ranks.sum([*local, *(self._host[name] for name in host_names)])
        sums = dict(zip(names, totals[: len(names)], strict=True))
        host = dict(zip(host_names, totals[len(names) :], strict=True))
        elapsed_s = self._clock() - self._opened_at
        values = averages(sums, self._targets)
        steps = max(self.num_steps, 1)
        values["tokens_per_second"] = host.pop("tokens", 0.0) / elapsed_s
        slots = host.pop("slots", 0.0)
        padded = host.pop("padding", 0.0)
        values["slots_per_second"] = slots / elapsed_s
        values["padding_share"] = padded / slots if slots else 0.0
        values["step_seconds"] = elapsed_s / steps
        for name, value in host.items():
            values[name] = value / ranks.world_size / steps
        values["memory_gib"] = peak_memory_gib(ranks.device)
        self.__init__(self._clock)  # type: ignore[misc]
        return values


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: on the GPU what torch allocated, on the CPU resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    except (OSError, IndexError):
        # Not Linux.  On Linux this one begins with the peak of the process that started this one.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class MetricsLog:
    """metrics.jsonl and TensorBoard, written by one rank."""

    def __init__(self, path: Path, tensorboard: Path, *, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = path
        _drop_steps_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        # purge_step hides what an earlier attempt wrote beyond the checkpoint.
        self._board: Any = SummaryWriter(str(tensorboard), purge_step=resumed_step + 1)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One record: `kind` is train, eval or event."""
        record = {"kind": kind, "step": step, "time": time.time(), **values}
        with disk.disk_errors(self._path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._board.add_scalar(f"{_board_group(kind, name)}/{name}", value, step)
        self._board.flush()

    def close(self) -> None:
        self._file.close()
        self._board.close()


_PERFORMANCE = ("seconds", "tokens_per_second", "padding_share", "memory_gib", "tflops", "mfu", "_s")


def _board_group(kind: str, name: str) -> str:
    return "performance" if kind == "train" and name.endswith(_PERFORMANCE) else kind


def _drop_steps_after(path: Path, step: int) -> None:
    """Keep the records up to `step`; a line that a crash cut short goes with the lost steps."""
    if not path.exists():
        return
    kept = [line for line, record in _records_with_lines(path) if record["step"] <= step]
    disk.write_bytes(path, "".join(kept).encode())


def _records_with_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                found.append((line if line.endswith(os.linesep) else line + "\n", json.loads(line)))
            except ValueError:
                log.warning("%s: a torn line is dropped", path)
    return found


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Records of metrics.jsonl, in order; of one kind, if it is named."""
    if not path.exists():
        return []
    records = [record for _, record in _records_with_lines(path)]
    return [record for record in records if kind is None or record["kind"] == kind]
