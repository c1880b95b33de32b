"""Jobs of plain `ray job submit`: the same run under Ray and under the local launcher."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from dist_lm.checkpoint import commit
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import REPOSITORY, losses, run_command, train_locally, write_recipe
from tests.ray.hosts import DASHBOARD_PORT, RAY, Network

pytestmark = pytest.mark.ray

RECIPE = Path("launch/recipes/topics.yaml")
KILL = "kill@rank1:step5:after_step"
DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}
"""Makes equal losses say that the random numbers are equal, too."""


@dataclass(frozen=True)
class Cluster:
    """A head node, and a copy of the repository to submit from."""

    net: Network
    tree: Path

    def submit(self, *words: str, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """`ray job submit` of launch/on_ray.py with the recipe; waits for the end."""
        return self.net.head.run(
            [
                *(RAY, "job", "submit", "--working-dir", self.tree),
                *("--runtime-env-json", json.dumps({"env_vars": variables or {}})),
                *("--", "python", "launch/on_ray.py", "-c", RECIPE, *words),
            ],
            env={"RAY_API_SERVER_ADDRESS": f"http://{self.net.head.address}:{DASHBOARD_PORT}"},
        )


@pytest.fixture(scope="module")
def cluster(head_net: Network, clean_tree: Path, topics_data: Path) -> Cluster:
    settings = {"zero": 2, "batch__micro": 8, "deepspeed": "ds_configs/cpu_gloo.json", **DROPOUT}
    write_recipe(clean_tree / RECIPE, topics_data, **settings)
    return Cluster(head_net, clean_tree)


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


def test_ray_goes_on_with_a_local_run(cluster: Cluster, calm: dict[int, float], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    died = train_locally(cluster.tree / RECIPE, f"run.dir={run_dir}", env={"DIST_LM_FAULT": KILL})
    assert died.returncode == 1, died.stdout + died.stderr
    done = cluster.submit(f"run.dir={run_dir}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert launchers(run_dir) == ["local", "ray"]
    assert losses(run_dir) == calm


def test_a_relative_run_folder_is_refused_before_ray_is_reached(topics_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data, run__dir="runs/x")
    done = run_command([sys.executable, REPOSITORY / "launch" / "on_ray.py", "-c", recipe])
    assert done.returncode == 2
    assert "run.dir `runs/x` is relative" in done.stderr
