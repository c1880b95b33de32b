"""Who am I among the ranks, and how do all ranks agree.

Enters: the environment contract (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR,
MASTER_PORT), the same under every launcher.  Leaves: a Ranks object.
Promises: what `agree` returns or raises is the same on every rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dist_lm.errors import EnvironmentFault

T = TypeVar("T")

REQUIRED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
COLLECTIVE_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Ranks:
    """This process among the `world_size` processes of a run."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup | None
    """gloo group for small host-side messages; None where the default group is gloo already."""

    @classmethod
    def connect(
        cls,
        environment: Mapping[str, str] = os.environ,
        *,
        timeout_s: float = COLLECTIVE_TIMEOUT_S,
    ) -> Ranks:
        """Join the process group that the environment describes, or take the one that exists.

        Raises EnvironmentFault where a variable is missing or the others cannot be reached.
        """
        missing = [name for name in REQUIRED if name not in environment]
        if missing:
            raise EnvironmentFault(
                f"this process does not know its rank: {', '.join(missing)} not set",
                why="Every launcher sets these variables for each rank.",
                do="Start with `dist-lm train --cpu 2`, `deepspeed launch/train.py` or launch/on_ray.py.",
            )
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment["LOCAL_RANK"])
        use_cpu = environment.get("DS_ACCELERATOR") == "cpu" or not torch.cuda.is_available()
        if not use_cpu:
            torch.cuda.set_device(local_rank % torch.cuda.device_count())
        device = torch.device("cpu") if use_cpu else torch.device("cuda", torch.cuda.current_device())
        if not dist.is_initialized():
            _initialise("gloo" if use_cpu else "nccl", rank, world_size, timeout_s, environment)
        host_group = None if use_cpu else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        return cls(rank, local_rank, world_size, device, host_group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def agree(self, decide: Callable[[], T]) -> T:
        """Run `decide` on rank 0; every rank returns what it returned, or raises what it raised."""
        message: list[Any] = [None, None]
        if self.is_first:
            try:
                message[0] = decide()
            except Exception as error:
                message[1] = error
        dist.broadcast_object_list(message, src=0, group=self.host_group)
        if message[1] is not None:
            raise message[1]
        decision: T = message[0]
        return decision

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in rank order, on every rank."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.host_group)
        return values

    def sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks in float64, on the host."""
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.host_group)
        return [float(value) for value in total]

    def barrier(self) -> None:
        dist.barrier(group=self.host_group)

    def raise_together(self, error: Exception | None) -> None:
        """Raise on every rank if any rank brings an error: nobody is left waiting for a peer.

        The rank that failed raises its own error, the others the first one among the ranks.
        """
        errors = self.gather(error)
        if error is not None:
            raise error
        for other in errors:
            if other is not None:
                raise other


def _initialise(backend: str, rank: int, world_size: int, timeout_s: float, environment: Mapping[str, str]) -> None:
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        address = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
        raise EnvironmentFault(
            f"rank {rank} of {world_size} could not join the others at {address}",
            why=str(error).splitlines()[0],
            do="Check that every rank was started and that the address can be reached from this host.",
        ) from error


def disconnect() -> None:
    """Leave the process group, so that no peer waits for this process."""
    if dist.is_initialized():
        dist.destroy_process_group()
