"""Programs that take turns: stopped with all that they started, and none is left behind."""

from __future__ import annotations

import os
import select
import sys
from pathlib import Path

import pytest

from bench.scaling import exponent
from bench.turns import EndedEarly, Program, Turns, take_turns

pytestmark = pytest.mark.fast
# A launcher whose child leaves its process group and session, as ranks do.
LAUNCHER = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
open(sys.argv[1] + ".new", "w").write(str(child.pid))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(600)
"""


def state(process: int) -> str:
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_program_rests_with_its_children_and_ends_with_them(tmp_path: Path) -> None:
    told = tmp_path / "child"
    turns = Program([sys.executable, "-c", LAUNCHER, str(told)], tmp_path / "log", dict(os.environ))
    try:
        while not told.exists():
            turns.run(0.2)
        turns.run(0.05)
        assert turns.process is not None
        child = int(told.read_text())
        ended = os.pidfd_open(child)
        # A stop counts once the process is given the processor again; the test's own time limit ends the wait.
        while {state(turns.process.pid), state(child)} != {"T"}:
            os.sched_yield()
        assert turns.seconds == pytest.approx(turns.active_s(turns.stretches[-1][1]))
    finally:
        turns.end()
    # Readable once the process is no more.
    assert select.select([ended], [], [], 60)[0] == [ended]
    os.close(ended)


def test_a_clock_runs_in_turns_only() -> None:
    turns = Turns(list, stretches=[(10.0, 14.0), (20.0, 25.0)])
    assert [turns.active_s(moment) for moment in (9.0, 12.0, 17.0, 22.0, 99.0)] == [0.0, 2.0, 4.0, 6.0, 9.0]


def test_a_moment_counts_in_the_turn_that_it_lies_in_once_that_has_settled() -> None:
    turns = Turns(list, stretches=[(10.0, 14.0), (20.0, 25.0)])
    assert turns.inside([21.0, 9.0, 10.5, 13.0, 14.0, 17.0], settles_s=1.0) == [[13.0, 14.0], [21.0]]


def test_each_round_another_is_the_first() -> None:
    order: list[str] = []

    class Party(Turns):
        def run(self, seconds: float) -> None:
            order.append(self.name)

        def __init__(self, name: str) -> None:
            super().__init__(list)
            self.name = name

    take_turns([Party(name) for name in "abc"], 0, until=lambda: len(order) == 12)
    assert "".join(order) == "abcbcacababc"


def test_a_program_that_ends_is_told(tmp_path: Path) -> None:
    turns = Program([sys.executable, "-c", "print('so it was')"], tmp_path / "log", dict(os.environ))
    with pytest.raises(EndedEarly, match="so it was"):
        take_turns([turns], 0.2, until=lambda: False)


def test_an_exponent_is_the_power() -> None:
    rows = [{"x": x, "y": 3 * x**1.5} for x in (1.0, 4.0, 16.0)]
    assert exponent(rows, "x", "y") == pytest.approx(1.5)
