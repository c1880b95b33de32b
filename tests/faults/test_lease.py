"""One attempt at a time may write into a run folder, and the latest one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm import lease
from dist_lm.errors import EnvironmentFault
from dist_lm.lease import TTL_S, Fenced, Lease

pytestmark = pytest.mark.fast


class Clock:
    """Time that only passes in pauses; something may happen during each."""

    def __init__(self, during_pause=lambda: None) -> None:  # type: ignore[no-untyped-def]
        self.now, self.during_pause = 0.0, during_pause

    def __call__(self) -> float:
        return self.now

    def pause(self, seconds: float) -> None:
        self.now += seconds
        self.during_pause()


def held_elsewhere(folder: Path, *, attempt: int = 1, beats: int = 1, at: float = 0.0, supervisor: str = "") -> None:
    holder = {"attempt": attempt, "host": "another-host", "pid": 1, "beats": beats, "at": at, "supervisor": supervisor}
    folder.mkdir(exist_ok=True)
    (folder / f"{attempt:04d}.json").write_text(json.dumps(holder))


def test_a_late_process_of_an_earlier_attempt_is_refused(tmp_path: Path) -> None:
    late = Lease.take(tmp_path / "leases", 1)
    late.check()
    late.beat(step=3)
    held_elsewhere(tmp_path / "leases", attempt=2)
    with pytest.raises(Fenced, match="has lost the run to attempt 2"):
        late.check()
    with pytest.raises(Fenced):
        late.beat(step=4)
    # Nor does it give back what it no longer has.
    late.release()
    assert lease.read(tmp_path / "leases")["attempt"] == 2


@pytest.mark.parametrize("wall_clock", [0.0, 4e9])
def test_a_holder_on_another_host_is_followed_once_its_beat_stands_still(tmp_path: Path, wall_clock: float) -> None:
    # Whatever its clock says: a host may live in the past or in the future.
    held_elsewhere(tmp_path / "leases", at=wall_clock)
    clock = Clock()
    taken = Lease.take(tmp_path / "leases", 2, clock=clock, pause=clock.pause)
    assert clock.now >= TTL_S
    taken.check()


def test_a_holder_that_goes_on_beating_is_not_pushed_aside(tmp_path: Path) -> None:
    path = tmp_path / "leases"
    held_elsewhere(path)
    clock = Clock(lambda: held_elsewhere(path, beats=int(clock.now * 10)))
    with pytest.raises(EnvironmentFault, match="being trained by another process") as caught:
        Lease.take(path, 2, clock=clock, pause=clock.pause)
    assert "dist-lm stop" in caught.value.do
    assert lease.read(path)["attempt"] == 1


def test_a_dead_process_of_this_host_is_followed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "leases"
    program = f"from dist_lm.lease import Lease; from pathlib import Path; Lease.take(Path({str(path)!r}), 1)"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert not lease.read(path).get("released")
    clock = Clock()
    Lease.take(path, 2, clock=clock, pause=clock.pause).check()
    assert clock.now == 0.0


def test_a_lease_that_was_given_back_is_free(tmp_path: Path) -> None:
    path = tmp_path / "leases"
    Lease.take(path, 1).release(step=9)
    assert lease.read(path)["step"] == 9
    clock = Clock()
    Lease.take(path, 2, clock=clock, pause=clock.pause)
    assert clock.now == 0.0


def test_a_late_beat_cannot_take_the_lease_back(tmp_path: Path) -> None:
    folder = tmp_path / "leases"
    late, later = Lease.take(folder, 1), Lease.take(folder, 2)
    # It has looked before the later one came, and writes after that.
    late._write({"step": 7})
    later.check()
    with pytest.raises(Fenced, match="to attempt 2"):
        late.beat()
    assert lease.read(folder)["attempt"] == 2


@pytest.mark.parametrize(("supervisor", "waits"), [("ours", False), ("theirs", True), ("", True)])
def test_one_supervisor_takes_over_from_a_holder_that_it_gave_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, supervisor: str, waits: bool
) -> None:
    monkeypatch.setenv(lease.SUPERVISOR_VARIABLE, "ours")
    folder = tmp_path / "leases"
    held_elsewhere(folder, supervisor=supervisor)
    clock = Clock(lambda: held_elsewhere(folder, beats=int(clock.now * 10), supervisor=supervisor))
    if waits:
        with pytest.raises(EnvironmentFault, match="being trained by another process"):
            Lease.take(folder, 2, clock=clock, pause=clock.pause)
    else:
        Lease.take(folder, 2, clock=clock, pause=clock.pause).check()
        assert clock.now == 0.0
