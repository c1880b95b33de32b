"""SIGKILL, SIGSTOP and signals on real processes of real launchers: what follows equals what would have been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.store import LocalStore
from dist_lm.cluster.local import free_port
from dist_lm.faults import GATE_VARIABLE, OF_EXPORT, POINTS
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.sample_log import samples_by_step
from dist_lm.status import status_of
from tests.gloo_ranks import REPOSITORY, environment, losses, run_command, train_locally, write_recipe
from tests.rank_scenarios import scenario, train_scenarios

DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}
COMMON = {"zero": 2, "batch__micro": 8, "run__eval_every": 3, "run__best": {}, **DROPOUT}
DEADLINE_S = 240
PROGRAMS = Path(sys.executable).parent
BOUNDED = [
    "kill@rank1:step5:in_collective",
    "kill@rank*:step5:before_optimizer",
    "kill@rank1:step3:in_write",
    "kill@rank0:step6:after_publish",
]
"""The part of the matrix that every test run has; `make soak` runs all of it."""
_SAVES = POINTS.index("before_save"), POINTS.index("in_evaluation")
MATRIX = [
    f"kill@rank{rank}:step{3 if _SAVES[0] <= number <= _SAVES[1] else 5}:{point}"
    for number, point in enumerate(POINTS)
    for rank in ("0", "1", "*")
    if point not in OF_EXPORT
    # Only rank 0 publishes and prunes, only the other one reports.
    if not (rank == "1" and POINTS.index("before_manifest") <= number <= POINTS.index("after_prune"))
    and not (rank != "1" and point == "after_report")
]


@pytest.fixture(scope="module")
def calm_run(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happens to; its samples are beside it."""
    folder = tmp_path_factory.mktemp("calm")
    (folder / "samples").mkdir()
    config = scenario(topics_data, folder / "run", samples=str(folder / "samples"), **COMMON)
    train_scenarios(folder, [config], num_ranks=2)
    return folder / "run"


@pytest.fixture(scope="module")
def calm(calm_run: Path) -> dict[int, float]:
    """Its losses."""
    return losses(calm_run)


def all_verify(run: Path) -> bool:
    store = LocalStore(run / "checkpoints")
    checkpoints = [Checkpoint.read(store, name) for name in store.names()]
    return bool(checkpoints) and not any(one.damage(one.files) for one in checkpoints)


def check_kill(fault: str, calm_run: Path, data: Path, folder: Path) -> None:
    recipe = write_recipe(folder / "recipe.yaml", data, **COMMON)
    samples = folder / "samples"
    samples.mkdir()
    done = train_locally(recipe, max_restarts=1, env={"DIST_LM_FAULT": fault, "DIST_LM_SAMPLES": str(samples)})
    assert done.returncode == 0, done.stdout + done.stderr
    # The fault did fire.
    assert "was ended by SIGKILL" in done.stdout
    # Rank 0 may live long enough to record the crash that it saw; where it was killed, the next one does.
    first, second = (facts["reason"] for facts in status_of(RunDir(folder / "run")).attempts)
    assert first in (("crash", "died") if "rank1" in fault else ("died",))
    assert second == "done"
    assert losses(folder / "run") == losses(calm_run)
    assert samples_by_step(samples) == samples_by_step(calm_run.parent / "samples")
    assert all_verify(folder / "run")
    assert not [*(folder / "run" / "checkpoints").glob(".tmp-*")]


@pytest.mark.parametrize("fault", BOUNDED)
def test_a_killed_rank_costs_nothing_but_time(fault: str, calm_run: Path, topics_data: Path, tmp_path: Path) -> None:
    check_kill(fault, calm_run, topics_data, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("fault", MATRIX)
def test_every_crash_point_on_one_rank_and_on_all(
    fault: str, calm_run: Path, topics_data: Path, tmp_path: Path
) -> None:
    check_kill(fault, calm_run, topics_data, tmp_path)


def test_a_frozen_rank_is_recognised_and_the_run_goes_on(
    calm: dict[int, float], topics_data: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data, run__stall_limit_s=3, **COMMON)
    done = train_locally(recipe, max_restarts=1, env={"DIST_LM_FAULT": "stop@rank1:step5:before_optimizer"})
    assert done.returncode == 0, done.stdout + done.stderr
    # The last heartbeat of the frozen rank is up to a second old, and these steps are shorter.
    assert "rank 1 does not answer, last seen in" in done.stdout + done.stderr
    assert "rank 0 is in `step` at step 5" in done.stdout + done.stderr
    assert "rank 0 ended with code 6" in done.stdout
    (report,) = (tmp_path / "run" / "errors").glob("attempt-0001-rank-00000.txt")
    assert "Thread" in report.read_text()
    # With py-spy, C++ frames too; and the collective that rank 0 waits in.
    assert "all_reduce" in report.read_text() or "gloo::" in report.read_text()
    if (PROGRAMS / "py-spy").exists():
        pid = RunDir(tmp_path / "run").attempt_facts(1)["pids"][0]
        native = report.read_text().partition(f"Process {pid}:")[2]
        assert "Thread" in native
        assert "libtorch_cpu.so" in native
    collectives = json.loads(report.with_suffix(".collectives.json").read_text())["entries"]
    assert collectives[-1]["profiling_name"].startswith("gloo:")
    assert losses(tmp_path / "run") == calm


def test_a_crash_loop_is_recognised_and_ended(topics_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data, **COMMON)
    done = train_locally(recipe, max_restarts=50, env={"DIST_LM_FAULT": "kill@rank1:step2:before_forward:always"})
    assert done.returncode == 1
    assert "No checkpoint came of 3 attempts in a row" in done.stdout
    found = status_of(RunDir(tmp_path / "run"))
    assert found.faults == len(found.attempts) == 3
    assert found.state in ("died", "crash")


def by_us(recipe: Path) -> list[str]:
    words = [sys.executable, "-m", "dist_lm", "train", "-c", str(recipe), "--cpu", "2", "--max-restarts", "1"]
    return words


def by_deepspeed(recipe: Path) -> list[str]:
    port = str(free_port())
    launcher = [str(PROGRAMS / "deepspeed"), "--num_accelerators", "2", "--master_port", port]
    return [*launcher, str(REPOSITORY / "launch" / "train.py"), "-c", str(recipe)]


def by_torchrun(recipe: Path) -> list[str]:
    launcher = [str(PROGRAMS / "torchrun"), "--nproc-per-node", "2", "--master-port", str(free_port())]
    return [*launcher, str(REPOSITORY / "launch" / "train.py"), "-c", str(recipe)]


def ask_by_signal(number: signal.Signals) -> Callable[[Any, Path], None]:
    return lambda process, run: os.kill(process.pid, number)


def ask_one_rank(process: Any, run: Path) -> None:
    os.kill(RunDir(run).attempt_facts(1)["pids"][1], signal.SIGTERM)


def ask_by_command(process: Any, run: Path) -> None:
    told = run_command([sys.executable, "-m", "dist_lm", "stop", run])
    assert told.returncode == 0, told.stderr


REQUESTS = {
    "local, SIGTERM": (by_us, ask_by_signal(signal.SIGTERM), 75),
    "local, SIGINT to the launcher": (by_us, ask_by_signal(signal.SIGINT), 75),
    "local, dist-lm stop": (by_us, ask_by_command, 75),
    "local, SIGKILL of the launcher": (by_us, ask_by_signal(signal.SIGKILL), -9),
    "deepspeed, SIGTERM": (by_deepspeed, ask_by_signal(signal.SIGTERM), -15),
    "deepspeed, SIGTERM to one rank": (by_deepspeed, ask_one_rank, 75),
    "torchrun, SIGTERM": (by_torchrun, ask_by_signal(signal.SIGTERM), 1),
}
OFTEN = ("local, dist-lm stop", "deepspeed, SIGTERM")


def check_request(name: str, data: Path, folder: Path) -> None:
    launcher, ask, exit_code = REQUESTS[name]
    # The rate is the same whatever run.steps is, so that a shorter calm run is comparable.
    options = {**COMMON, "run__eval_every": 0, "run__best": None, "optim__schedule": {"kind": "constant"}}
    recipe = write_recipe(folder / "recipe.yaml", data, **options, run__steps=20_000)
    run = folder / "run"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            launcher(recipe), env=environment(), cwd=REPOSITORY, stdout=log, stderr=log, start_new_session=True
        )
    deadline = time.monotonic() + DEADLINE_S
    try:
        while len(read_metrics(run / "metrics.jsonl", "train")) < 5:
            alive = process.poll() is None and time.monotonic() < deadline
            assert alive, (folder / "log").read_text()
            time.sleep(0.1)
        family = [psutil.Process(pid) for pid in RunDir(run).attempt_facts(1)["pids"]]
        ask(process, run)
        assert process.wait(DEADLINE_S) == exit_code, (folder / "log").read_text()
        # No orphan, whatever the launcher did.
        _, left = psutil.wait_procs(family, timeout=DEADLINE_S)
        assert not left
    finally:
        for one in psutil.process_iter(["cmdline"]):
            if str(recipe) in (one.info["cmdline"] or []):
                one.kill()
    reached = max(losses(run))
    assert LocalStore(run / "checkpoints").names()[0] == f"step-{reached:08d}"
    assert all_verify(run)
    assert status_of(RunDir(run)).attempts[0]["reason"] == "stopped"
    # What follows the stop is what would have been.
    longer = {**options, "run__steps": reached + 2, "run__allow_change": ["run.steps"]}
    train_scenarios(folder, [scenario(data, folder / name, **longer) for name in ("run", "calm")], num_ranks=2)
    assert RunDir(run).attempt_facts(2)["from_step"] == reached
    assert losses(run) == losses(folder / "calm")


@pytest.mark.parametrize("name", OFTEN)
def test_a_request_saves_and_leaves_no_process(name: str, topics_data: Path, tmp_path: Path) -> None:
    check_request(name, topics_data, tmp_path)


@pytest.mark.soak
@pytest.mark.parametrize("name", [name for name in REQUESTS if name not in OFTEN])
def test_every_request_under_every_launcher(name: str, topics_data: Path, tmp_path: Path) -> None:
    check_request(name, topics_data, tmp_path)


@pytest.mark.soak
def test_a_second_signal_ends_launcher_and_ranks_that_cannot_stop(topics_data: Path, tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path / "recipe.yaml", topics_data, **COMMON), tmp_path / "run"
    hold = {"DIST_LM_FAULT": "hold@rank1:step2:before_forward", GATE_VARIABLE: str(tmp_path / "gate")}
    process = subprocess.Popen(by_us(recipe), env=environment(hold), cwd=REPOSITORY)
    deadline = time.monotonic() + DEADLINE_S
    while not (tmp_path / "held").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    family = [psutil.Process(pid) for pid in RunDir(run).attempt_facts(1)["pids"]]
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(2.0)
    process.send_signal(signal.SIGTERM)
    assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
    _, left = psutil.wait_procs(family, timeout=DEADLINE_S)
    assert not left
