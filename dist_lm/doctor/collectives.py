"""Whether ranks of this machine find each other, and how fast they add up a tensor.

Enters: a number of ranks.  Leaves: a finding with the bandwidth.  Promises: the ranks end with it.
Run as a program, it is one of the ranks.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator

from dist_lm.cluster.local import free_port
from dist_lm.doctor.finding import Finding, fail, ok

ELEMENTS = 1 << 22
ROUNDS = 4
_MEETING_S = 60.0
_MARK = "GB/s "


def check_collectives(num_ranks: int, *, cpu: bool) -> Iterator[Finding]:
    """An all-reduce of 16 MiB, by gloo on CPUs and by NCCL on GPUs."""
    shared = {"WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks, "MASTER_ADDR": "127.0.0.1"}
    environment = {**os.environ, **{name: str(value) for name, value in shared.items()}}
    environment["MASTER_PORT"] = str(free_port())
    if cpu:
        environment["DS_ACCELERATOR"] = "cpu"
    with contextlib.ExitStack() as stack:
        ranks = [stack.enter_context(_rank(environment, rank)) for rank in range(num_ranks)]
        until = time.monotonic() + 2 * _MEETING_S
        said = []
        for process in ranks:
            try:
                said.append(process.communicate(timeout=max(1.0, until - time.monotonic()))[0])
            except subprocess.TimeoutExpired:
                said.append("no answer in time")
        failed = next((number for number, process in enumerate(ranks) if process.returncode), None)
    kind = "gloo" if cpu else "NCCL"
    if failed is not None:
        words = [line for line in said[failed].splitlines() if line.strip()]
        do = "Look at GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME, /dev/shm and the firewall; NCCL_DEBUG=INFO tells more."
        yield fail("collectives", f"{num_ranks} {kind} ranks cannot work together: {_telling(words)}", do)
        return
    rate = float(said[0].rpartition(_MARK)[2])
    yield ok("collectives", f"{kind} all-reduce of {ELEMENTS * 4 / 2**20:.0f} MiB, {num_ranks} ranks: {rate:.2f} GB/s")


def _telling(lines: list[str]) -> str:
    errors = [line.strip() for line in lines if "rror" in line]
    return (errors or lines or ["a rank was killed"])[-1][:200]


@contextlib.contextmanager
def _rank(environment: dict[str, str], rank: int) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_lm.doctor.collectives"],
        env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _work() -> None:
    """One rank: prints the bus bandwidth, 2 (n - 1) / n of the bytes in the time of a round."""
    import torch
    import torch.distributed as dist

    from dist_lm.ranks import Ranks, disconnect

    ranks = Ranks.connect(timeout_s=_MEETING_S)
    tensor = torch.ones(ELEMENTS, device=ranks.device)
    dist.all_reduce(tensor)
    ranks.barrier()
    began_at = time.perf_counter()
    for _ in range(ROUNDS):
        dist.all_reduce(tensor)
    # The device has done its work when the host has a number.
    assert float(tensor[0]) == float(ranks.world_size) ** (ROUNDS + 1)
    round_s = (time.perf_counter() - began_at) / ROUNDS
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * ELEMENTS * 4
    print(f"{_MARK}{moved / round_s / 1e9:.3f}", flush=True)
    disconnect()


if __name__ == "__main__":
    _work()
