"""A run on the test bed that a test watches, disturbs and compares with an undisturbed one.

Enters: a network of hosts and a recipe.  Leaves: what the run folder and the driver's log say.
Promises: waiting ends with an error that shows the log.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_lm.errors import StopRequested
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.sample_log import VARIABLE, samples_by_step
from tests.gloo_ranks import REPOSITORY, losses, train_locally, write_recipe
from tests.ray.hosts import Host, Network

WAIT_S = 300.0
ON_THE_NODE_AT = """
import functools, runpy, sys
import ray
ray.init = functools.partial(ray.init, _node_ip_address=sys.argv[1])
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A driver asks the Ray of its own host.  It would look for that among the processes, and on this machine it
sees those of all hosts."""
LOOK_S = 0.05
IDLE = "ray::IDLE"
ENDLESS = 1_000_000
SETTINGS: dict[str, Any] = {
    "batch__global": 16,
    "batch__micro": 8,
    "run__save_every": 5,
    "run__keep": 2,
    "zero": 1,
    # The same learning rate at each step, however many follow.
    "optim__schedule__kind": "constant",
}


def samples_in(folder: Path) -> dict[str, str]:
    """Variables of a test bed whose workers log their samples there."""
    samples = folder / "samples"
    samples.mkdir()
    return {VARIABLE: str(samples)}


class WatchedRun:
    """A run without end, from its driver on `host`."""

    def __init__(self, net: Network, host: Host, folder: Path, data: Path, *overrides: str, **settings: Any) -> None:
        folder.mkdir(exist_ok=True)
        self.net, self.host, self.data, self.log = net, host, data, folder / "driver.log"
        self.samples = Path(net.variables[VARIABLE])
        self.run_dir = RunDir(folder / "run")
        self._settings = {**SETTINGS, **settings}
        recipe = write_recipe(folder / "recipe.yaml", data, run__steps=ENDLESS, **self._settings)
        on_its_node = [sys.executable, "-c", ON_THE_NODE_AT, host.address]
        self._words = [*on_its_node, REPOSITORY / "launch" / "on_ray.py", "-c", recipe, *overrides]
        self.driver: subprocess.Popen[bytes]
        self.start()

    def start(self) -> None:
        """The command of a user."""
        self.driver = self.host.popen(self._words, self.log)

    def told(self) -> str:
        return self.log.read_text(errors="replace")

    def attempts(self) -> list[dict[str, Any]]:
        number = len(list(self.run_dir.attempts.glob("*.json")))
        return [self.run_dir.attempt_facts(1 + attempt) for attempt in range(number)]

    def sizes(self) -> list[int]:
        """Workers of each group so far."""
        return [facts["world_size"] for facts in self.attempts()]

    def pids(self) -> list[int]:
        """Processes of the newest group, by rank."""
        pids: list[int] = self.attempts()[-1]["pids"]
        return pids

    def last_step(self) -> int:
        return max((record["step"] for record in read_metrics(self.run_dir.metrics, "train")), default=0)

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not ready():
            assert self.driver.poll() is None, self.told()[-6000:]
            assert time.monotonic() < deadline, self.told()[-6000:]
            time.sleep(LOOK_S)

    def until_it_trains_with(self, *sizes: int) -> None:
        """Groups of these sizes began one after the other, and the last one has made steps."""
        self.until(lambda: self.sizes() == list(sizes))
        began_at: float = self.attempts()[-1]["began_at"]
        self.until(lambda: sum(r["time"] > began_at for r in read_metrics(self.run_dir.metrics, "train")) > 2)

    def host_of(self, rank: int) -> Host:
        """Where a rank of the newest group runs."""
        pid = self.pids()[rank]
        return next(host for host in self.net.hosts if pid in host.pids())

    def spares(self) -> list[psutil.Process]:
        """Processes of Ray on all hosts that wait for work."""
        pids = [pid for host in self.net.hosts for pid in host.pids()]
        return [process for process in map(psutil.Process, filter(psutil.pid_exists, pids)) if process.name() == IDLE]

    def stop(self) -> None:
        """Ctrl-C on the driver; until nothing of the run is left."""
        group = [psutil.Process(pid) for pid in self.pids() if psutil.pid_exists(pid)] + self.spares()
        self.driver.send_signal(signal.SIGINT)
        assert self.driver.wait(timeout=WAIT_S) == StopRequested.exit_code, self.told()[-6000:]
        assert psutil.wait_procs(group, timeout=WAIT_S)[1] == []
        assert f"stopped at step {self.last_step()} of" in self.told()
        assert self.last_step() in self.saved_steps()

    def saved_steps(self) -> list[int]:
        return [int(folder.name.removeprefix("step-")) for folder in sorted(self.run_dir.checkpoints.glob("step-*"))]

    def assert_as_undisturbed(self, folder: Path) -> None:
        """The same samples at each step, each once, and the same losses, as a run on one rank here."""
        steps = self.last_step()
        folder.mkdir()
        variables = samples_in(folder)
        recipe = write_recipe(folder / "recipe.yaml", self.data, run__steps=steps, **self._settings)
        done = train_locally(recipe, num_ranks=1, env=variables)
        assert done.returncode == 0, done.stdout + done.stderr
        found, expected = samples_by_step(self.samples), samples_by_step(Path(variables[VARIABLE]))
        found = {step: samples for step, samples in found.items() if step <= steps}
        assert found == expected
        seen = [sample for samples in found.values() for sample in samples]
        assert len(seen) == len(set(seen)) == steps * self._settings["batch__global"]
        assert losses(self.run_dir.path) == pytest.approx(losses(folder / "run"), rel=1e-5)
