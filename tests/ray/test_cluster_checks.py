"""A cluster that a run cannot go on is refused before anything starts, and the node is named."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dist_lm.errors import EnvironmentFault
from tests.gloo_ranks import REPOSITORY, write_recipe
from tests.ray.hosts import GCS_PORT, RAY, Network, network

pytestmark = pytest.mark.ray
METADATA_PORT = 8080
WATCHING = {"RAY_enable_autoscaler_v2": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
"""Ray's autoscaler, as Kubernetes has it without scaling: it answers, and adds no node."""
JOINED = """
import sys, ray
from pathlib import Path
from dist_lm.cluster.ray_recovery import Recovery
ray.init()
known = {node["NodeID"] for node in ray.nodes() if node["NodeManagerAddress"] == sys.argv[2]}
known.add(ray.get_runtime_context().get_node_id())
run_dir = Path(sys.argv[1])
Recovery(run_dir, run_dir, known=known, max_restarts=0).before_worker_group_start(None)
"""
"""What Ray's controller calls before it starts a group of workers, on a cluster of two known nodes and a new one."""

ASKS_TOO_LATE = """
import os, signal, sys
from pathlib import Path
from dist_lm.cluster import ray_cluster
ray_cluster.NODE_ANSWER_S = float(sys.argv[3])
ray_cluster.connect()
nodes = ray_cluster.living_nodes()
for pid in sys.argv[4:]:
    os.kill(int(pid), signal.Signals[sys.argv[2]])
ray_cluster.check_nodes(Path(sys.argv[1]), nodes)
"""
"""A signal comes to all processes of a node between the look at the nodes and the question to each."""


@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    """A head, one good worker, and a host for a bad one."""
    with network(3) as made:
        made.start_head(num_cpus=0, env=WATCHING)
        made.start_node(made.hosts[1])
        made.wait_for_nodes(2)
        yield made


@pytest.fixture
def recipe(topics_data: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "recipe.yaml", topics_data, run__dir=str(tmp_path / "shared" / "run"))


def train(net: Network, recipe: Path, *overrides: str, **env: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, REPOSITORY / "launch" / "on_ray.py", "-c", recipe, *overrides]
    return net.head.run(words, env=env, timeout_s=120)


def assert_refused(net: Network, done: subprocess.CompletedProcess[str], *told: str) -> None:
    assert done.returncode == EnvironmentFault.exit_code, done.stdout + done.stderr
    for words in told:
        assert words in done.stderr
    # No group of workers was started, and nothing of the driver is left.
    assert "TrainController" not in done.stdout + done.stderr
    running = list(names(net))
    assert "raylet" in running
    assert not [name for name in running if name.startswith(("ray::RayTrain", "ray::TrainC"))]


def names(net: Network) -> Iterator[str]:
    """Of all processes on all hosts."""
    for pid in [pid for host in net.hosts for pid in host.pids()]:
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(pid).name()


def test_a_cluster_smaller_than_the_least_number_of_workers(net: Network, recipe: Path) -> None:
    done = train(net, recipe, "ray.workers={min: 3, max: 8}")
    assert_refused(net, done, "the Ray cluster has room for 1 of at least 3 workers", net.hosts[1].address)
    done = train(net, recipe, "ray.workers=1", "ray.label_selector={market: spot}")
    assert_refused(net, done, "room for 0 of at least 1 workers", "lacks the labels {'market': 'spot'}")
    done = train(net, recipe, "ray.label_selector={market: spot}")
    assert_refused(net, done, "no room for a worker, and the run does not say how many", "Write ray.workers=8")
    assert not (recipe.parent / "shared").exists()


def test_an_address_that_does_not_answer(net: Network, recipe: Path) -> None:
    done = train(net, recipe, RAY_ADDRESS=f"{net.head.address}:1")
    assert_refused(net, done, f"nobody answers at {net.head.address}:1", "refused")
    done = train(net, recipe, RAY_ADDRESS=f"{net.subnet}.250:6379")
    assert_refused(net, done, f"nobody answers at {net.subnet}.250:6379")


def test_versions_that_differ_are_told_by_node(net: Network, recipe: Path, tmp_path: Path) -> None:
    facts = tmp_path / "other" / "torch-1.0.0.dist-info"
    facts.mkdir(parents=True)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n")
    odd = net.hosts[2]
    net.start_node(odd, env={"PYTHONPATH": f"{tmp_path / 'other'}:{REPOSITORY}"})
    net.wait_for_nodes(3)
    try:
        done = train(net, recipe)
        assert_refused(net, done, "different versions", "torch: ", f"1.0.0 on {odd.address}", "on the driver")
        assert "numpy" not in done.stderr
        # A running group meets it before it grows: the node goes, and the run goes on.
        joined = net.head.run([sys.executable, "-c", JOINED, tmp_path / "run", net.hosts[1].address])
        assert joined.returncode == 0, joined.stderr
        assert f"1.0.0 on {odd.address}" in joined.stderr
        net.wait_for_nodes(2)
    finally:
        odd.kill()
        net.wait_for_nodes(2)


def broken_package(folder: Path) -> Path:
    """A dist_lm that raises when it is imported."""
    package = folder / "broken" / "dist_lm"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise ImportError("half of an installation")')
    return package


@pytest.mark.soak
def test_a_node_that_has_nothing_but_a_broken_installation_is_refused(
    net: Network, recipe: Path, tmp_path: Path
) -> None:
    odd = net.hosts[2]
    # On this node the folder of the driver's code holds something else.
    mount = f'mount --bind {broken_package(tmp_path)} {REPOSITORY / "dist_lm"} && exec "$@"'
    net.start_node(odd, inside=["unshare", "--mount", "sh", "-c", mount, "sh"])
    net.wait_for_nodes(3)
    try:
        done = train(net, recipe)
        assert_refused(net, done, f"node {odd.address} (", "cannot run this project", "half of an installation")
        assert "constraints.txt on every node" in done.stderr
    finally:
        odd.kill()
        net.wait_for_nodes(2)


@pytest.mark.soak
def test_a_node_whose_own_installation_is_broken_trains_by_the_code_of_the_driver(
    net: Network, recipe: Path, tmp_path: Path
) -> None:
    odd = net.hosts[2]
    net.start_node(odd, env={"PYTHONPATH": str(broken_package(tmp_path).parent)})
    net.wait_for_nodes(3)
    try:
        done = train(net, recipe)
        # What workers import ahead must not fail there: Ray would start them again and again.
        assert done.returncode == 0, done.stdout + done.stderr
        assert odd.address in done.stderr
    finally:
        odd.kill()
        net.wait_for_nodes(2)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("number", "wait_s", "told"),
    [("SIGSTOP", 3, "no answer within 3 s from {}"), ("SIGKILL", 60, "node {} was lost while it was asked")],
)
def test_a_node_that_ends_while_it_is_asked_is_named(
    net: Network, tmp_path: Path, number: str, wait_s: int, told: str
) -> None:
    odd = net.hosts[2]
    net.start_node(odd)
    net.wait_for_nodes(3)
    try:
        name = odd.address if number == "SIGSTOP" else f"{odd.address} ({net.node_id(odd)[:6]})"
        done = net.head.run([sys.executable, "-c", ASKS_TOO_LATE, tmp_path / "run", number, wait_s, *odd.pids()])
        assert told.format(name) in done.stderr
        assert "`ray status`" in done.stderr
    finally:
        odd.kill()
        net.wait_for_nodes(2)


def test_a_run_folder_that_one_node_does_not_reach(net: Network, recipe: Path, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    lonely = net.hosts[2]
    # The node has a disk of its own where the others share one.
    own_disk = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {shared} && exec "$@"', "sh"]
    net.start_node(lonely, inside=own_disk)
    net.wait_for_nodes(3)
    try:
        done = train(net, recipe)
        assert_refused(net, done, "not every node reaches the run folder: 1 of 3", lonely.address, "No such file")
        assert net.hosts[1].address not in done.stderr
        # What the check wrote is gone.
        assert list((shared / "run" / "logs" / "ray").iterdir()) == []
    finally:
        lonely.kill()
        net.wait_for_nodes(2)


def test_the_sidecar_of_spot_nodes_drains_the_node_that_it_runs_on(net: Network, tmp_path: Path) -> None:
    leaving, staying = net.hosts[2], net.node_ids()
    net.start_node(leaving)
    net.wait_for_nodes(3)
    notice = tmp_path / "metadata" / "computeMetadata" / "v1" / "instance" / "preempted"
    notice.parent.mkdir(parents=True)
    notice.write_text("TRUE")
    serve = [sys.executable, "-m", "http.server", str(METADATA_PORT), "--bind", "127.0.0.1"]
    leaving.popen([*serve, "--directory", tmp_path / "metadata"], tmp_path / "metadata.log")
    address = ("--address", f"{net.head.address}:{GCS_PORT}", "--ray", RAY)
    sidecar = [sys.executable, REPOSITORY / "cluster" / "spot_notice.py", "gcp", *address]
    metadata = ("--metadata", f"http://127.0.0.1:{METADATA_PORT}")
    try:
        # It finds its own raylet among those of all hosts.
        done = leaving.run([*sidecar, *metadata], env={"TMPDIR": str(tmp_path), "RAY_ADDRESS": ""})
        assert done.returncode == 0, done.stdout + done.stderr
        # Nobody works on it, so that it goes at once.
        net.wait_for_nodes(2)
        assert net.node_ids() == staying
    finally:
        leaving.kill()
