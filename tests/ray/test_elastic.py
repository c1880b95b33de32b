"""Three hosts train; one is cut off, two go on; it comes back, three go on; nothing is lost or doubled."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_lm.run_dir import RunDir
from tests.gloo_ranks import REPOSITORY, losses, train_locally, write_recipe
from tests.ray.hosts import network

pytestmark = pytest.mark.ray
STEPS = 150
SLOW = "4mbit"
"""What a host sends while the test waits for Ray: half a second a step, so that steps are left."""
WAIT_S = 120.0


def attempts(run_dir: Path) -> list[dict[str, Any]]:
    folder = RunDir(run_dir).attempts
    return [RunDir(run_dir).attempt_facts(1 + number) for number in range(len(list(folder.glob("*.json"))))]


def records(run_dir: Path) -> list[dict[str, Any]]:
    path = RunDir(run_dir).metrics
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(ready: Callable[[], bool], driver: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not ready():
        assert driver.poll() is None, log.read_text()[-6000:]
        assert time.monotonic() < deadline, log.read_text()[-6000:]
        try:
            driver.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue


def test_a_run_shrinks_when_a_host_is_cut_off_and_grows_when_it_is_back(topics_data: Path, tmp_path: Path) -> None:
    settings = {"batch__global": 16, "batch__micro": 8, "run__steps": STEPS, "run__save_every": 5, "zero": 1}
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data, **settings)
    run_dir, log = tmp_path / "run", tmp_path / "driver.log"

    def sizes() -> list[int]:
        return [facts["world_size"] for facts in attempts(run_dir)]

    def trains_with(*expected: int) -> Callable[[], bool]:
        """Groups of these sizes began one after the other, and the last one trains."""
        began = len(records(run_dir))
        return lambda: sizes() == list(expected) and len(records(run_dir)) > began + 3

    with network(4) as net:
        net.start_head(num_cpus=0)
        workers = net.hosts[1:]
        for host in workers:
            net.start_node(host)
        net.wait_for_nodes(4)
        for host in workers:
            host.slow_down(SLOW)
        words = [sys.executable, REPOSITORY / "launch" / "on_ray.py", "-c", recipe]
        net.head.popen([*words, "ray.workers={min: 1, max: 3}", "ray.resize_s=5"], log)
        driver = net.head.processes[-1]
        wait_until(trains_with(3), driver, log)
        # All hosts share this machine's disk, which no cut takes away: a first rank that goes on to
        # write there would rightly keep the run's lease.
        first_rank = attempts(run_dir)[0]["pids"][0]
        lost = next(host for host in workers if first_rank not in host.pids())
        lost.cut()
        wait_until(trains_with(3, 2), driver, log)
        # Ray has given the host up, and its node ends when it hears of that: it comes back as a new one.
        lost.kill()
        lost.join_again()
        net.start_node(lost)
        wait_until(trains_with(3, 2, 3), driver, log)
        for host in workers:
            host.give_back_speed()
        assert driver.wait(timeout=WAIT_S) == 0, log.read_text()[-6000:]
        told = log.read_text()
    assert f"done    step {STEPS} of {STEPS}" in told
    assert sizes() == [3, 2, 3]

    calm = write_recipe(tmp_path / "calm.yaml", topics_data, run__dir=str(tmp_path / "calm"), **settings)
    assert train_locally(calm, num_ranks=1).returncode == 0
    assert losses(run_dir) == pytest.approx(losses(tmp_path / "calm"), rel=1e-5)
    assert tokens(run_dir) == tokens(tmp_path / "calm")


def tokens(run_dir: Path) -> dict[int, float]:
    """Tokens trained on up to each step: a row that was lost or came twice would show."""
    return {record["step"]: record["tokens"] for record in records(run_dir) if record["kind"] == "train"}
