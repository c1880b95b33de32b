"""A stop request reaches ranks that wait for a server which does not answer, and loses nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_lm.checkpoint.store import LocalStore
from dist_lm.run_dir import RunDir
from dist_lm.status import status_of
from dist_lm.watchdog import read_heartbeat
from tests.data.http_server import FaultyServer, serving
from tests.faults.test_kills import all_verify
from tests.gloo_ranks import losses, write_recipe
from tests.rank_scenarios import launch_here

DEADLINE_S = 120


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stop_rank_1_once_it_waits(run: Path, section: str, server: FaultyServer, release: threading.Event) -> None:
    """Hold the server's answers after some steps; SIGTERM to one rank when all of them stand still."""
    try:
        until(lambda: len(losses(run)) >= 3)
        server.hold = release
        until(
            lambda: any(
                (beat := read_heartbeat(RunDir(run), rank)).get("section") == section and beat["waited_s"] >= 2
                for rank in (0, 1)
            )
        )
        assert server.held.is_set()
        os.kill(RunDir(run).attempt_facts(1)["pids"][1], signal.SIGTERM)
        until(lambda: "ended_at" in RunDir(run).attempt_facts(1))
    finally:
        release.set()


@pytest.mark.parametrize("section", ["data", "evaluation"])
def test_a_stop_while_a_server_hangs_saves_and_ends_with_75(section: str, topics_data: Path, tmp_path: Path) -> None:
    release = threading.Event()
    with serving(topics_data / "pairs") as server:
        remote = {"train": f"{server.url}/train"} if section == "data" else {"heldout": f"{server.url}/heldout"}
        recipe = write_recipe(
            tmp_path / "recipe.yaml",
            topics_data,
            **{f"data__{name}": url for name, url in remote.items()},
            **{"run__steps": 10**6, "run__save_every": 10**6, "run__eval_every": 10**6 if "train" in remote else 40},
            **{"zero": 3, "batch__micro": 16},
        )
        run = tmp_path / "run"
        code = launch_here(recipe, run, meanwhile=lambda: stop_rank_1_once_it_waits(run, section, server, release))
    assert code == 75
    reached = max(losses(run))
    assert LocalStore(run / "checkpoints").names() == [f"step-{reached:08d}"]
    assert all_verify(run)
    assert status_of(RunDir(run)).attempts[0]["reason"] == "stopped"
