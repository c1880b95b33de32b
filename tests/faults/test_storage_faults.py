"""Storage that is full, forbidden, slow or dead, and a clock that jumps: real ranks, real file systems."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_lm.checkpoint.store import LocalStore
from dist_lm.data.storage import join, write_bytes
from dist_lm.faults import GATE_VARIABLE
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.status import status_of
from tests.data.s3_server import BUCKET, S3Server, s3_serving
from tests.rank_scenarios import attempt_scenarios, losses, scenario

DEADLINE_S = 300
ZERO2 = {"zero": 2, "batch__micro": 16}


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """A real file system of this size."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert mounted.returncode == 0, f"these tests mount small file systems, as root: {mounted.stderr}"
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def slow_then_dead(root: Path, server: S3Server) -> None:
    """Let the slow write go on when training is two steps further; later end the server amid a save."""
    gate, held = root / "gate", root / "held"
    try:
        until(held.exists)
        until(lambda: max(losses(root / "slow"), default=0) >= 5)
        gate.touch()
        until(lambda: max(losses(root / "dead"), default=0) >= 3)
        held.unlink()
        gate.unlink()
        until(held.exists)
        server.stop()
    finally:
        gate.touch()


@pytest.fixture(scope="module")
def runs(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """All runs of this module, on two ranks, and how each ended."""
    root = tmp_path_factory.mktemp("storage")
    bucket = f"s3://{BUCKET}"
    with small_disk(root / "full", "1500k"), small_disk(root / "forbidden", "1500k"), s3_serving() as server:
        for path in (topics_data / "pairs").glob("*/*"):
            write_bytes(join(f"{bucket}/{path.parent.name}", path.name), path.read_bytes())
        remote = {"data__train": f"{bucket}/train", "data__heldout": f"{bucket}/heldout"}
        full = {"run__checkpoints": str(root / "full"), "run__save_retries": 0, **ZERO2}
        plan: dict[str, dict[str, Any]] = {
            "calm": ZERO2,
            "whole": {**remote, "run__checkpoints": f"{bucket}/whole", **ZERO2},
            "slow": {"fault": "hold@rank1:step3:before_write", **ZERO2},
            "dead": {
                **{"fault": "hold@rank0:step6:after_write", "run__checkpoints": f"{bucket}/dead"},
                **{"run__save_retries": 1, **ZERO2},
            },
            "full-run": full,
            "forbidden/run": ZERO2,
            # The last one: the ranks' clock stays wrong.
            "clock": {"fault": "clock@rank0:step4:before_data", **ZERO2},
        }
        remount(root / "forbidden", "ro")
        with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(1) as pool:
            patched.setenv(GATE_VARIABLE, str(root / "gate"))
            configs = [scenario(topics_data, root / name, **changes) for name, changes in plan.items()]
            told = pool.submit(slow_then_dead, root, server)
            ended = dict(zip(plan, attempt_scenarios(root / "ranks", configs, num_ranks=2), strict=True))
            told.result()
        ended["full-run, before"] = LocalStore(root / "full").names()
        # Somebody has freed space.
        remount(root / "full", "size=9m")
        ended["dead, before"] = losses(root / "dead")
        server.start()
        del plan["dead"]["fault"]
        again = [scenario(topics_data, root / name, **plan[name]) for name in ("full-run", "dead")]
        outcomes = attempt_scenarios(root / "again", again, num_ranks=2)
        ended["full-run, again"], ended["dead, again"] = outcomes
        ended["full-run, after"] = LocalStore(root / "full").names()
        yield root, ended


def test_a_full_disk_keeps_what_is_there_and_the_run_goes_on_when_there_is_space(runs: Any) -> None:
    root, ended = runs
    assert ended["full-run"]["exit_code"] == 4
    assert "No space left on device" in ended["full-run"]["message"]
    assert ended["full-run, before"] == ["step-00000003"]
    assert ended["full-run, again"]["exit_code"] == 0, ended
    assert ended["full-run, after"] == ["step-00000006", "step-00000003"]
    assert RunDir(root / "full-run").attempt_facts(2)["from_step"] == 3
    assert losses(root / "full-run") == losses(root / "calm")


def test_a_run_folder_that_may_not_be_written_is_named(runs: Any) -> None:
    root, ended = runs
    assert ended["forbidden/run"]["exit_code"] == 4
    assert "Read-only file system" in ended["forbidden/run"]["message"]
    assert str(root / "forbidden" / "run") in ended["forbidden/run"]["message"]


def test_a_clock_that_jumps_changes_nothing(runs: Any) -> None:
    root, ended = runs
    assert ended["clock"]["exit_code"] == 0, ended["clock"]
    times = [record["time"] for record in read_metrics(root / "clock" / "metrics.jsonl", "train")]
    assert times[-1] < times[0] - 80_000
    assert losses(root / "clock") == losses(root / "calm")
    found = status_of(RunDir(root / "clock"))
    assert found.state == "done"
    assert 0.0 <= found.goodput <= 1.0


def test_a_run_whose_data_and_checkpoints_are_in_object_storage_equals_the_local_one(runs: Any) -> None:
    root, ended = runs
    assert ended["whole"]["exit_code"] == 0, ended["whole"]
    assert losses(root / "whole") == losses(root / "calm")
    assert not LocalStore(root / "whole" / "checkpoints").names()


def test_training_goes_on_while_storage_is_slow(runs: Any) -> None:
    root, ended = runs
    assert ended["slow"]["exit_code"] == 0, ended["slow"]
    records = read_metrics(root / "slow" / "metrics.jsonl")
    kinds = [record.get("saved", record["step"]) for record in records if record["kind"] in ("train", "event")]
    # The save of step 3 was published after step 5 was trained; nothing of it is lost.
    assert kinds.index("step-00000003") > kinds.index(5)
    assert LocalStore(root / "slow" / "checkpoints").names() == ["step-00000006", "step-00000003"]
    assert losses(root / "slow") == losses(root / "calm")


def test_an_object_store_that_dies_amid_a_save_ends_all_ranks_alike(runs: Any) -> None:
    _, ended = runs
    assert ended["dead"]["exit_code"] == 4
    assert "cannot" in ended["dead"]["message"]
    assert f"s3://{BUCKET}/dead" in ended["dead"]["message"]
    assert sorted(ended["dead, before"]) == list(range(1, 7))


def test_a_run_whose_object_store_came_back_goes_on_as_the_calm_one(runs: Any) -> None:
    root, ended = runs
    assert ended["dead, again"]["exit_code"] == 0, ended["dead, again"]
    assert RunDir(root / "dead").attempt_facts(2)["from_step"] == 3
    assert losses(root / "dead") == losses(root / "calm")
