"""Ray's own autoscaler, from no worker node: it brings nodes for a job, replaces one that dies, and takes
them away again."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dist_lm.errors import EnvironmentFault
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import write_recipe
from tests.ray.hosts import DASHBOARD_PORT, GCS_PORT, Network, network

pytestmark = [pytest.mark.ray, pytest.mark.soak]
WAIT_S = 120.0
ENDLESS = 1_000_000
PROVIDER = "tests.ray.fake_nodes.OwnFolders"
VARIABLES = {
    "RAY_FAKE_CLUSTER": "1",
    # What `ray up` sets for a head.
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": "f" * 51 + "00000",
    "RAY_NODE_TYPE_NAME": "ray.head.default",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def cluster_file(folder: Path, net: Network) -> Path:
    """At most two nodes with one CPU each; a node that idles for twelve seconds goes."""
    path, gcs_address = folder / "cluster.yaml", f"{net.head.address}:{GCS_PORT}"
    worker = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    # By its name Ray would look for the provider's defaults, which its wheel lacks.
    provider = {"type": "external", "module": PROVIDER, "folder": str(net.folder), "launch_multiple": True}
    commands = ("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands")
    config = {
        **{name: [] for name in (*commands, "head_start_ray_commands", "worker_start_ray_commands")},
        **{"cluster_synced_files": [], "file_mounts": {}},
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.2,
        "upscaling_speed": 1.0,
        "provider": {
            **provider,
            "gcs_address": gcs_address,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
    }
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass(frozen=True)
class Scaled:
    """A head without CPUs, and an autoscaler that may add two nodes on its host."""

    net: Network

    def told(self) -> str:
        logs = sorted(self.net.folder.glob("*/*/session_latest/logs/[mj]o[nb]*.log"))
        return "\n".join(f"{path}\n{path.read_text(errors='replace')[-4000:]}" for path in logs)

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not ready():
            assert time.monotonic() < deadline, self.told()

    def workers(self) -> set[str]:
        return self.net.node_ids() - {VARIABLES["RAY_CLOUD_INSTANCE_ID"]}

    def dist_lm(self, *words: str | Path, code: int = 0) -> str:
        address = ("--address", f"http://{self.net.head.address}:{DASHBOARD_PORT}")
        done = self.net.head.run([sys.executable, "-m", "dist_lm", *words, *address])
        assert done.returncode == code, done.stdout + done.stderr + self.told()
        return done.stdout


@pytest.fixture
def scaled(tmp_path: Path) -> Iterator[Scaled]:
    with network(1) as net:
        config = cluster_file(tmp_path, net)
        net.start_head("--autoscaling-config", str(config), num_cpus=0, env=VARIABLES)
        net.wait_for_nodes(1)
        yield Scaled(net)


def test_nodes_come_for_a_job_are_replaced_and_go(scaled: Scaled, topics_data: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    two: dict[str, Any] = {"ray__workers": 2}
    run_dir = RunDir(tmp_path / "long")
    long = write_recipe(tree / "long.yaml", topics_data, run__dir=str(run_dir.path), run__steps=ENDLESS, **two)
    short = write_recipe(tree / "short.yaml", topics_data, run__dir=str(tmp_path / "short"), **two)

    def attempts() -> list[dict[str, Any]]:
        return [run_dir.attempt_facts(1 + number) for number in range(len(list(run_dir.attempts.glob("*.json"))))]

    def trains() -> bool:
        began_at = attempts()[-1]["began_at"]
        return any(record["time"] > began_at for record in read_metrics(run_dir.metrics, "train"))

    submit = ("submit", "--working-dir", tree, "-c")
    assert scaled.workers() == set()
    too_many = scaled.dist_lm(*submit, short, "ray.workers=3", "--follow", code=EnvironmentFault.exit_code)
    assert "room for 0 of at least 3 workers" in too_many
    scaled.dist_lm(*submit, long)
    scaled.until(lambda: len(attempts()) == 1 and trains())
    first = scaled.workers()
    assert len(first) == 2

    # A node goes with all that runs on it.
    pid = attempts()[0]["pids"][1]
    raylet = next(one for one in psutil.Process(pid).parents() if one.name() == "raylet")
    for process in [raylet, *raylet.children(recursive=True)]:
        os.kill(process.pid, signal.SIGKILL)
    scaled.until(lambda: len(attempts()) == 2 and trains())
    second = scaled.workers()
    assert len(second) == 2
    assert len(first & second) == 1
    assert [facts["world_size"] for facts in attempts()] == [2, 2]

    assert "STOPPED" in scaled.dist_lm("job", "stop", "long")
    steps = max(record["step"] for record in read_metrics(run_dir.metrics, "train"))
    assert (run_dir.checkpoints / f"step-{steps:08d}").is_dir()
    scaled.until(lambda: scaled.workers() == set())

    # From none to the end, and to none again.
    assert "done    step 6 of 6" in scaled.dist_lm(*submit, short, "--follow")
    scaled.until(lambda: scaled.workers() == set())
