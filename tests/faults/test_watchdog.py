"""A stall is told with the place of every rank; a rank that waits for a busy peer is not stalled."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.run_dir import RunDir
from dist_lm.watchdog import Watchdog, limit_s, pause_s, read_heartbeat

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _without_native_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """py-spy would read the symbols of all that this test process has loaded, for ten seconds a stall."""
    monkeypatch.setattr("dist_lm.watchdog.native_stacks", lambda path: None)


class Host:
    """Watchdogs of several ranks, one clock, and the exit codes of those that gave up."""

    def __init__(self, folder: Path, world_size: int, floor_s: float = 10.0) -> None:
        self.run_dir, self.now = RunDir(folder), 0.0
        self.codes: dict[int, int] = {}
        self.dogs = [
            Watchdog(
                self.run_dir,
                rank,
                world_size,
                attempt=1,
                floor_s=floor_s,
                clock=lambda: self.now,
                end=lambda code, rank=rank: self.codes.setdefault(rank, code),
            )
            for rank in range(world_size)
        ]

    def steps(self, count: int, seconds: float = 1.0) -> None:
        for step in range(1, count + 1):
            for section in ("data", "step"):
                for dog in self.dogs:
                    dog.enter(section, step)
                self.now += seconds

    def wait(self, seconds: int, *, ticking: tuple[int, ...]) -> None:
        for _ in range(seconds):
            self.now += 1.0
            for rank in ticking:
                self.dogs[rank].tick()


def test_limits_grow_with_what_was_seen() -> None:
    assert limit_s(10.0, None) == 100.0
    assert limit_s(10.0, 1.0) == 10.0
    assert limit_s(10.0, 7.0) == 35.0


def test_the_next_look_comes_when_the_limit_passes() -> None:
    assert pause_s(2.0, 10.0) == 1.0
    assert pause_s(9.75, 10.0) == 0.25
    assert pause_s(10.0, 10.0) == 1.0


def test_the_last_of_a_group_to_be_late_ends_it(tmp_path: Path) -> None:
    host = Host(tmp_path, 2)
    host.steps(3)
    host.dogs[1].enter("step", 4)
    host.now += 0.5
    host.dogs[0].enter("step", 4)
    host.now += 9.75
    host.dogs[1].tick()
    assert host.codes == {}, "rank 0 is within its limit"
    host.now += 0.5
    host.dogs[0].tick()
    assert host.codes == {0: 6}


def test_a_frozen_rank_is_recognised_and_named_by_the_others(tmp_path: Path) -> None:
    host = Host(tmp_path, 2)
    host.steps(3)
    host.wait(1, ticking=(0, 1))
    # Rank 1 no longer runs: SIGSTOP, or a dead host.
    host.wait(30, ticking=(0,))
    assert host.codes == {0: 6}
    (report,) = host.run_dir.errors.glob("*rank-00000.txt")
    text = report.read_text()
    assert "error[stalled] rank 0 made no progress" in text
    assert "rank 1 does not answer, last seen in `step` at step 3" in text
    assert "test_watchdog.py" in text, "the stacks"


def test_waiting_for_a_peer_that_is_within_its_limits_is_no_stall(tmp_path: Path) -> None:
    host = Host(tmp_path, 2)
    host.dogs[1].enter("checkpoint", 0)
    host.now += 20.0
    host.steps(3)
    # Rank 1 writes a large checkpoint: it once took 20 s, so it may take 100; rank 0 waits in `data`.
    host.dogs[1].enter("checkpoint", 3)
    host.dogs[0].enter("data", 4)
    host.wait(60, ticking=(0, 1))
    assert host.codes == {}
    host.wait(60, ticking=(0, 1))
    assert host.codes == {0: 6, 1: 6}


def test_a_jump_of_the_wall_clock_is_no_stall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, 1)
    host.steps(3)
    monkeypatch.setattr("time.time", lambda: 4e9)
    host.wait(5, ticking=(0,))
    assert host.codes == {}


def test_useful_time_is_that_of_steps_and_their_data(tmp_path: Path) -> None:
    host = Host(tmp_path, 1)
    host.now += 50.0
    host.steps(4, seconds=2.0)
    host.dogs[0].enter("checkpoint", 4)
    host.now += 30.0
    host.dogs[0].enter("data", 5)
    assert host.dogs[0].useful_s == 16.0


def test_a_duty_that_fails_does_not_end_the_watch(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError("the disk is read-only")

    seen = []
    dog = Watchdog(RunDir(tmp_path), 0, 1, 1, floor_s=10.0, duties=[fail, lambda: seen.append(1)])
    dog.tick()
    assert seen == [1]
    assert read_heartbeat(RunDir(tmp_path), 0)["section"] == "init"
