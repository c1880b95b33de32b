"""A worker that is killed on three hosts; the samples and the losses are those of the calm run."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.ray.hosts import network
from tests.ray.watched import WatchedRun, samples_in

pytestmark = [pytest.mark.ray, pytest.mark.soak]
SLOW = "4mbit"


def test_a_worker_is_killed(topics_data: Path, tmp_path: Path) -> None:
    with network(4, samples_in(tmp_path)) as net:
        net.start_head(num_cpus=0)
        for host in net.hosts[1:]:
            net.start_node(host)
        net.wait_for_nodes(4)
        for host in net.hosts[1:]:
            host.slow_down(SLOW)
        run = WatchedRun(net, net.head, tmp_path / "run", topics_data, "ray.workers=3", "--max-restarts", "1")
        run.until_it_trains_with(3)
        os.kill(run.pids()[1], signal.SIGKILL)
        run.until_it_trains_with(3, 3)
        run.stop()
    run.assert_as_undisturbed(tmp_path / "calm")
