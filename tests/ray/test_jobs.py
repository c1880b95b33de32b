"""Jobs from submission to resume, on a Ray head with a token, by the command line."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_lm.errors import EnvironmentFault, StopRequested
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import REPOSITORY, write_recipe
from tests.ray.hosts import DASHBOARD_PORT, RAY, Network

pytestmark = pytest.mark.ray
WAIT_S = 150.0
ENDLESS = 1_000_000
CALM_LINES = 60


@pytest.fixture
def net(head_net: Network) -> Network:
    return head_net


@pytest.fixture
def tree(clean_tree: Path, topics_data: Path, tmp_path: Path) -> Path:
    """A clean working directory to submit from."""
    # Nothing dies here: no process need wait with all its imports.
    one: dict[str, Any] = {"ray__workers": 1, "ray__spare_workers": False}
    write_recipe(clean_tree / "small.yaml", topics_data, run__dir=str(tmp_path / "small"), **one)
    write_recipe(
        clean_tree / "endless.yaml", topics_data, run__dir=str(tmp_path / "endless"), run__steps=ENDLESS, **one
    )
    return clean_tree


def dist_lm(net: Network, *words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    address = f"http://{net.head.address}:{DASHBOARD_PORT}"
    return net.head.run([sys.executable, "-m", "dist_lm", *words, "--address", address], env=env, timeout_s=180)


def submit(net: Network, tree: Path, recipe: str, *words: str) -> subprocess.CompletedProcess[str]:
    return dist_lm(net, "submit", "-c", tree / recipe, "--working-dir", tree, *words)


def submit_shipped(
    net: Network, folder: Path, data: Path, run_dir: Path, *words: str
) -> subprocess.CompletedProcess[str]:
    """A recipe that came with dist_lm, made small; from an empty folder."""
    folder.mkdir(exist_ok=True)
    small = {
        **{"run.dir": run_dir, "run.steps": 6, "run.log_every": 1, "ray.workers": 1, "model.size": "tiny"},
        "optim.schedule.warmup_steps": 1,
        **{f"data.{split}": data / "pairs" / split for split in ("train", "heldout")},
        "data.tokenizer": data / "tokenizer",
    }
    overrides = [f"{key}={value}" for key, value in small.items()]
    return dist_lm(net, "submit", "-c", "recipe:bert-mini-docs", "--working-dir", folder, *overrides, *words)


def last_step(run_dir: Path) -> int:
    path = RunDir(run_dir).metrics
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return max((line["step"] for line in lines), default=0)


def wait_until(ready: Callable[[], bool], net: Network) -> None:
    deadline = time.monotonic() + WAIT_S
    while not ready():
        assert time.monotonic() < deadline, dist_lm(net, "job", "status").stdout


def test_a_job_is_followed_to_its_end(net: Network, topics_data: Path, tmp_path: Path) -> None:
    shipped = (net, tmp_path / "empty", topics_data, tmp_path / "small")
    done = submit_shipped(*shipped, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "submitted small-1" in done.stdout
    assert "done    step 6 of 6" in done.stdout
    assert "small-1  SUCCEEDED" in dist_lm(net, "job", "status", "small").stdout
    # The exit code of a configuration that the run refuses comes through, too.
    refused = submit_shipped(*shipped, "--follow", "optim.lr=0.5")
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "belongs to a run with another configuration" in refused.stdout
    assert "optim.lr: 0.001 -> 0.5" in refused.stdout
    # Ray was not made to try again.
    assert "[FailurePolicy] RETRY" not in refused.stdout
    # A run without faults tells what the local launcher would, and little more.
    assert len(done.stdout.splitlines()) < CALM_LINES


def test_a_job_is_stopped_with_a_checkpoint_and_resumed(net: Network, tree: Path, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "endless")
    assert submit(net, tree, "endless.yaml").returncode == 0
    wait_until(lambda: last_step(run_dir.path) > 3, net)
    wait_until(lambda: "ray_dist_lm_loss{" in scrape(net), net)
    in_use = submit(net, tree, "endless.yaml", "--name", "other")
    assert in_use.returncode == EnvironmentFault.exit_code
    assert f"the run folder {run_dir.path} is in use" in in_use.stderr
    same_name = submit(net, tree, "small.yaml", "--name", "endless")
    assert same_name.returncode == EnvironmentFault.exit_code
    assert "the job name `endless` is in use" in same_name.stderr

    # Another run waits for room; Ctrl-C ends it, as there is nothing to save.
    log = tmp_path / "waiting.log"
    words = [sys.executable, REPOSITORY / "launch" / "on_ray.py", "-c", tree / "small.yaml", "ray.workers=2"]
    waiting = net.head.popen(words, log)
    wait_until(lambda: "Attempting to start training worker group" in log.read_text(), net)
    waiting.send_signal(signal.SIGINT)
    assert waiting.wait(timeout=WAIT_S) == StopRequested.exit_code, log.read_text()
    assert "stopped before a group of workers trained" in log.read_text()

    stopped = dist_lm(net, "job", "stop", "endless")
    assert stopped.returncode == 0, stopped.stderr
    assert "endless-1  STOPPED" in stopped.stdout
    step = last_step(run_dir.path)
    # The step that it stopped at is no multiple of run.save_every by chance only: the stop saved it.
    assert (run_dir.checkpoints / f"step-{step:08d}").is_dir()
    assert not run_dir.stop_file.exists()

    resumed = dist_lm(net, "job", "resume", "endless", "--working-dir", tree)
    assert "submitted endless-2" in resumed.stdout, resumed.stderr
    wait_until(lambda: last_step(run_dir.path) > step + 3, net)
    assert f"resume  step {step} " in ray_job(net, "logs", "endless-2")

    # Ray's own command does the same.
    ray_job(net, "stop", "endless-2")
    assert "endless-2  STOPPED" in dist_lm(net, "job", "status", "endless").stdout
    assert (run_dir.checkpoints / f"step-{last_step(run_dir.path):08d}").is_dir()
    assert not run_dir.stop_file.exists()


def scrape(net: Network) -> str:
    """What Prometheus would read from the head."""
    script = (
        "import ray, urllib.request; ray.init(log_to_driver=False); port = ray.nodes()[0]['MetricsExportPort']; "
        f"print(urllib.request.urlopen(f'http://{net.head.address}:{{port}}').read().decode())"
    )
    return net.head.run([sys.executable, "-c", script]).stdout


def ray_job(net: Network, *words: str) -> str:
    """What `ray job` prints."""
    address = {"RAY_API_SERVER_ADDRESS": f"http://{net.head.address}:{DASHBOARD_PORT}"}
    done = net.head.run([RAY, "job", *words], env=address)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_without_the_token_nothing_gets_in(net: Network, tree: Path) -> None:
    done = dist_lm(net, "submit", "-c", tree / "small.yaml", "--working-dir", tree, RAY_AUTH_TOKEN="0" * 64)
    assert done.returncode == EnvironmentFault.exit_code
    assert "does not take us" in done.stderr
    assert "RAY_AUTH_TOKEN" in done.stderr


def test_a_working_directory_that_is_too_large_is_not_sent(net: Network, tree: Path, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.mkdir()
    shutil.copy(tree / "small.yaml", large)
    with (large / "corpus.bin").open("wb") as file:
        file.truncate(101 * 2**20)
    done = submit(net, large, "small.yaml", "--name", "large")
    assert done.returncode == EnvironmentFault.exit_code, done.stdout + done.stderr
    assert "101.0 MiB  corpus.bin" in done.stderr
    assert "large" not in dist_lm(net, "job", "status").stdout


def test_an_id_that_a_job_of_others_has_is_named(net: Network, tree: Path) -> None:
    ray_job(net, "submit", "--no-wait", "--submission-id", "taken-1", "--", "true")
    done = submit(net, tree, "small.yaml", "--name", "taken")
    assert done.returncode == EnvironmentFault.exit_code, done.stdout + done.stderr
    assert "the head does not take the job taken-1" in done.stderr
    assert "already exists" in done.stderr


def test_a_job_that_is_not_there_is_named(net: Network) -> None:
    done = dist_lm(net, "job", "stop", "nothing")
    assert done.returncode == EnvironmentFault.exit_code
    assert "the cluster has no job `nothing`" in done.stderr
