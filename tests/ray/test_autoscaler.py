"""Ray's own autoscaler brings nodes for a job, replaces one that dies, and takes them away again."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import write_recipe
from tests.ray.hosts import DASHBOARD_PORT, GCS_PORT, Network, network

pytestmark = [pytest.mark.ray, pytest.mark.soak]
WAIT_S = 150.0
ENDLESS = 1_000_000
VARIABLES = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "0",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "AUTOSCALER_HEARTBEAT_TIMEOUT_S": "5",
}


def cluster_file(folder: Path, gcs_address: str) -> Path:
    """At most two nodes with one CPU each; a node that idles for six seconds goes."""
    path = folder / "cluster.yaml"
    worker = {"resources": {"CPU": 1, "object_store_memory": 80_000_000}, "node_config": {}, "max_workers": 2}
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": gcs_address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {"ray.head.default": head, "worker": worker},
        "head_node_type": "ray.head.default",
    }
    path.write_text(yaml.safe_dump(config))
    return path


def until(ready: Callable[[], bool], told: Callable[[], str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not ready():
        assert time.monotonic() < deadline, told()


def workers_of(net: Network) -> list[dict[str, Any]]:
    """The nodes that live, without the head."""
    script = "import json, ray; ray.init(log_to_driver=False); print(json.dumps(ray.nodes()))"
    done = net.head.run([sys.executable, "-c", script])
    assert done.returncode == 0, done.stderr
    nodes: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return [node for node in nodes if node["Alive"] and node["Resources"].get("CPU")]


def test_nodes_come_for_a_job_are_replaced_and_go(topics_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data, run__steps=ENDLESS)
    run_dir = RunDir(tmp_path / "run")

    def sizes() -> list[int]:
        number = len(list(run_dir.attempts.glob("*.json")))
        return [run_dir.attempt_facts(1 + attempt)["world_size"] for attempt in range(number)]

    def steps() -> int:
        return len(read_metrics(run_dir.metrics, "train"))

    with network(1) as net:
        config = cluster_file(tmp_path, f"{net.head.address}:{GCS_PORT}")
        net.start_head("--autoscaling-config", str(config), num_cpus=0, env=VARIABLES)
        net.wait_for_nodes(1)
        address = ("--address", f"http://{net.head.address}:{DASHBOARD_PORT}")

        def dist_lm(*words: str | Path) -> str:
            done = net.head.run([sys.executable, "-m", "dist_lm", *words, *address])
            return done.stdout + done.stderr

        def told() -> str:
            monitors = net.folder.glob("*/*/session_latest/logs/monitor.*")
            return "\n".join(path.read_text(errors="replace")[-3000:] for path in monitors)

        assert workers_of(net) == []
        said = dist_lm("submit", "-c", recipe, "--working-dir", tmp_path, "ray.workers=2")
        assert "submitted run-1" in said, said
        until(lambda: sizes() == [2] and steps() > 3, told)
        first = {node["NodeID"] for node in workers_of(net)}
        assert len(first) == 2

        # The node goes with all that runs on it.
        pid = run_dir.attempt_facts(1)["pids"][1]
        raylet = next(one for one in psutil.Process(pid).parents() if one.name() == "raylet")
        for process in [raylet, *raylet.children(recursive=True)]:
            os.kill(process.pid, signal.SIGKILL)
        until(lambda: sizes() == [2, 2], told)
        began_at = run_dir.attempt_facts(2)["began_at"]
        until(lambda: any(record["time"] > began_at for record in read_metrics(run_dir.metrics, "train")), told)
        second = {node["NodeID"] for node in workers_of(net)}
        assert len(second) == 2
        assert len(first & second) == 1

        assert "STOPPED" in dist_lm("job", "stop", "run")
        until(lambda: workers_of(net) == [], told)
