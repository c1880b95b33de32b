"""Jobs on a Ray cluster of one node, which this file starts on free ports and ends."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from dist_lm.checkpoint import commit
from dist_lm.cluster.local import free_port
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import REPOSITORY, environment, losses, run_command, train_locally, write_recipe

pytestmark = pytest.mark.ray

RAY = Path(sys.executable).with_name("ray")
START_S, END_S = 90, 30
RECIPE = Path("launch/recipes/topics.yaml")
KILL = "kill@rank1:step5:after_step"
DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}
"""Makes equal losses say that the random numbers are equal, too."""


@dataclass(frozen=True)
class Cluster:
    """A head node, and a copy of the repository to submit from."""

    variables: dict[str, str]
    tree: Path

    def submit(self, *words: str, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of launch/on_ray.py with the recipe; waits for the end."""
        return run_command(
            [
                *(RAY, "job", "submit", "--working-dir", self.tree),
                *("--runtime-env-json", json.dumps({"env_vars": variables or {}})),
                *("--", "python", "launch/on_ray.py", "-c", RECIPE, *words),
            ],
            env=self.variables,
        )


def start_head(folder: Path, variables: dict[str, str], dashboard_port: int) -> subprocess.Popen[bytes]:
    ports = {
        "--port": free_port(),
        "--dashboard-port": dashboard_port,
        "--dashboard-agent-listen-port": free_port(),
        "--ray-client-server-port": free_port(),
    }
    with (folder / "head.log").open("wb") as output:
        return subprocess.Popen(
            [
                *(str(RAY), "start", "--head", "--block", "--disable-usage-stats", "--num-cpus", "2"),
                *("--temp-dir", str(folder / "ray"), "--object-store-memory", "100000000"),
                *("--dashboard-host", "127.0.0.1", *(str(word) for port in ports.items() for word in port)),
            ],
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def wait_until_jobs_are_taken(head: subprocess.Popen[bytes], variables: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + START_S
    while run_command([RAY, "job", "list"], env=variables).returncode:
        assert head.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()


def end_head(head: subprocess.Popen[bytes]) -> None:
    """End the head and all that it started; fails if something had to be killed."""
    family = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
    head.terminate()
    _, left = psutil.wait_procs(family, timeout=END_S)
    for survivor in left:
        survivor.kill()
    psutil.wait_procs(left)
    head.wait()
    assert not left


@pytest.fixture(scope="module")
def cluster(topics_data: Path) -> Iterator[Cluster]:
    # Ray's sockets lie in this folder, and their names have a limit of 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="dist-lm-"))
    tree = folder / "tree"
    for name in ("dist_lm", "launch", "ds_configs"):
        shutil.copytree(REPOSITORY / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_recipe(tree / RECIPE, topics_data, zero=2, batch__micro=8, deepspeed="ds_configs/cpu_gloo.json", **DROPOUT)
    port = free_port()
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}",
        # No job is left when the head is ended: it need not wait for any.
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
    }
    head = start_head(folder, variables, port)
    try:
        wait_until_jobs_are_taken(head, variables, folder / "head.log")
        yield Cluster(variables, tree)
    finally:
        try:
            end_head(head)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def calm(cluster: Cluster, topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run that nothing happens to, under the local launcher."""
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    done = train_locally(cluster.tree / RECIPE, f"run.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    return losses(run_dir)


def launchers(run_dir: Path) -> list[str]:
    attempts = range(1, 1 + len(list(RunDir(run_dir).attempts.glob("*.json"))))
    return [RunDir(run_dir).attempt_facts(attempt)["launcher"] for attempt in attempts]


def test_ray_restarts_a_killed_worker_and_the_local_launcher_goes_on_with_the_run(
    cluster: Cluster, calm: dict[int, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = cluster.submit(f"run.dir={run_dir}", variables={"DIST_LM_FAULT": KILL})
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    # The fault did fire, and Ray started the group again.
    assert launchers(run_dir) == ["ray", "ray"]
    assert "resume  step 3 " in told
    assert "done    step 6 of 6" in told
    assert losses(run_dir) == calm
    # As a crash after step 3 would have left it.
    for folder in commit.published(run_dir / "checkpoints"):
        if folder.name != "step-00000003":
            shutil.rmtree(folder)
    local = train_locally(cluster.tree / RECIPE, f"run.dir={run_dir}")
    assert local.returncode == 0, local.stdout + local.stderr
    assert "resume  step 3 " in local.stdout
    assert launchers(run_dir) == ["ray", "ray", "local"]
    assert losses(run_dir) == calm


def test_ray_goes_on_with_a_local_run_and_refuses_another_configuration_for_it(
    cluster: Cluster, calm: dict[int, float], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    died = train_locally(cluster.tree / RECIPE, f"run.dir={run_dir}", env={"DIST_LM_FAULT": KILL})
    assert died.returncode == 1, died.stdout + died.stderr
    done = cluster.submit(f"run.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert launchers(run_dir) == ["local", "ray"]
    assert losses(run_dir) == calm
    refused = cluster.submit(f"run.dir={run_dir}", "optim.lr=0.001")
    told = refused.stdout + refused.stderr
    assert refused.returncode == 1
    assert "Job entrypoint command failed with exit code 2" in told
    assert "belongs to a run with another configuration" in told
    assert "optim.lr: 0.002 -> 0.001" in told
    # Ray was not made to try again.
    assert "[FailurePolicy] RETRY" not in told
    assert launchers(run_dir) == ["local", "ray"]
    assert losses(run_dir) == calm


def test_a_relative_run_folder_is_refused_before_ray_is_reached(topics_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data, run__dir="runs/x")
    done = run_command([sys.executable, REPOSITORY / "launch" / "on_ray.py", "-c", recipe])
    assert done.returncode == 2
    assert "run.dir `runs/x` is relative" in done.stderr
