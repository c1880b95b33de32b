"""Runs on the test bed of tests/ray/hosts.py, as bench/cluster.py and bench/cluster_overhead.py watch them.

Enters: hosts with a Ray node each, data.  Leaves: runs that train, and the seconds that a fault costs one of them.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import psutil

from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.tokenizer import train_tokenizer
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import REPOSITORY, write_recipe
from tests.ray.hosts import Host, Network
from tests.ray.watched import IDLE

WAIT_S = 150.0
TRAINED_S, RESTS_S = 10.0, 3.0
"""How long a run has trained at least when the fault comes, and for how long its spare workers have then rested: they
have imported everything."""
ENDLESS = 1_000_000
SIGNS = {
    "noticed": "[FailurePolicy] RETRY",
    "asked": "Attempting to start training worker group",
    "started": "Started training worker group",
}
"""What Ray's controller prints at the end of a phase."""


def prepare_text(folder: Path) -> Path:
    """The language reference of Python as training data."""
    texts = [topics[name] for name in sorted(topics)]
    source = folder / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, vocab_size=1000, out=folder / "tokenizer")
    common: dict[str, Any] = {"tokenizer": folder / "tokenizer", "seq_len": 64, "workers": 1, "heldout_fraction": 0.05}
    prepare(PrepareOptions([str(source)], folder / "pairs", **common))
    return folder


@dataclass
class Run:
    """A run on the test bed, until it is ended."""

    run_dir: RunDir
    driver: subprocess.Popen[bytes]
    log: Path

    def attempts(self) -> int:
        return len(list(self.run_dir.attempts.glob("*.json")))

    def last_step_at(self) -> float:
        times = [record["time"] for record in read_metrics(self.run_dir.metrics, "train")]
        return max(times, default=0.0)

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not ready():
            if self.driver.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run does not get there\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def until_it_trains(self) -> None:
        began = time.time()
        self.until(lambda: self.last_step_at() > began)

    def has_trained(self, net: Network | None = None) -> Run:
        """Wait until it has trained for TRAINED_S, and the spare workers of `net` are ready."""
        began = time.monotonic()
        self.until(lambda: time.monotonic() - began > TRAINED_S)
        if net is not None:
            spares = Spares(net)
            self.until(spares.are_ready)
        return self

    def measure(self, fault: Callable[[], None]) -> dict[str, float]:
        """Seconds from the fault to the end of each phase, the last of them the next step."""
        attempts, shown = self.attempts(), self.log.stat().st_size
        began = time.time()
        fault()
        seen: dict[str, float] = {}

        def trains_again() -> bool:
            said = self.log.read_bytes()[shown:].decode(errors="replace")
            for phase, sign in SIGNS.items():
                # A group that could not be had is asked for once more: the last one counts.
                if (said.count(sign), phase) not in counted and sign in said:
                    counted.add((said.count(sign), phase))
                    seen[phase] = time.time() - began
            return self.attempts() > attempts and self.last_step_at() > self._joined_at()

        counted: set[tuple[int, str]] = set()
        self.until(trains_again)
        seen["joined"] = self._joined_at() - began
        first = [r["time"] for r in read_metrics(self.run_dir.metrics, "train") if r["time"] > self._joined_at()]
        seen["step"] = min(first) - began
        return {phase: round(value, 1) for phase, value in seen.items()}

    def _joined_at(self) -> float:
        at: float = self.run_dir.attempt_facts(self.attempts())["began_at"]
        return at

    def worker_pids(self) -> list[int]:
        pids: list[int] = self.run_dir.attempt_facts(self.attempts())["pids"]
        return pids


@contextmanager
def run_on(net: Network, folder: Path, data: Path, *overrides: str) -> Iterator[Run]:
    """A run that trains; stopped when the block ends."""
    folder.mkdir()
    recipe = write_recipe(folder / "recipe.yaml", data, run__steps=ENDLESS, run__save_every=20, run__keep=2)
    log = folder / "driver.log"
    net.head.popen([sys.executable, REPOSITORY / "launch" / "on_ray.py", "-c", recipe, *overrides], log)
    driver = net.head.processes[-1]
    run = Run(RunDir(folder / "run"), driver, log)
    try:
        run.until_it_trains()
        yield run
    finally:
        driver.terminate()
        driver.wait()


class Spares:
    """Workers of Ray that wait for a group of ranks, or import what those need."""

    def __init__(self, net: Network) -> None:
        self._net = net
        self._used: dict[int, float] = {}
        self._at = time.monotonic()

    def are_ready(self) -> bool:
        """Call it again and again: it compares."""
        if time.monotonic() - self._at < RESTS_S:
            return False
        before, self._used, self._at = self._used, self._processor_seconds(), time.monotonic()
        if not before or before.keys() != self._used.keys():
            return False
        return all(self._used[pid] - used < RESTS_S / 20 for pid, used in before.items())

    def _processor_seconds(self) -> dict[int, float]:
        """By process."""
        found = {}
        for pid in (pid for host in self._net.hosts[1:] for pid in host.pids()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.name() == IDLE:
                    times = process.cpu_times()
                    found[pid] = times.user + times.system
        return found


def host_of(net: Network, pid: int) -> Host:
    return next(host for host in net.hosts if pid in host.pids())


def start_again(net: Network, *hosts: Host, **options: Any) -> None:
    """New nodes on these hosts, with options of `Network.start_node`; every other host has one."""
    for host in hosts:
        host.kill()
        host.join_again()
    # Until the old ones are known to be dead they would be counted for the new ones.
    net.wait_for_nodes(len(net.hosts) - len(hosts))
    for host in hosts:
        net.start_node(host, **options)
    net.wait_for_nodes(len(net.hosts))
