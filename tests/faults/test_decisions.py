"""Pure decisions: when to stop, when a run has diverged, which evaluation is the best."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm import duration, stop
from dist_lm.config import BestSection, EarlyStopSection
from dist_lm.errors import ConfigError
from dist_lm.faults import fault_point, forget
from dist_lm.guard import LEAST, DivergenceGuard
from dist_lm.selection import Selection
from dist_lm.stop import StopFlag

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("15min", 900), ("11h30min", 41400), ("1d", 86400), ("2h5s", 7205)]
)
def test_lengths_of_time_are_read(text: str, seconds: float) -> None:
    assert duration.seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "min", "15 min", "-5s", "1.5h"])
def test_other_texts_are_no_lengths_of_time(text: str) -> None:
    with pytest.raises(ValueError, match="no length of time"):
        duration.seconds(text)


def test_the_time_limit_a_file_and_the_budget_ask_or_end(tmp_path: Path) -> None:
    now, ended = [0.0], []
    flag = StopFlag(clock=lambda: now[0])
    limit = stop.at_time_limit(flag, 60.0, clock=lambda: now[0])
    budget = stop.within_budget(flag, 30.0, lambda: ended.append(1))
    on_file = stop.on_file(flag, tmp_path / "stop", "asked")
    for duty in (limit, budget, on_file):
        duty()
    assert flag.reason == ""
    now[0] = 60.0
    limit()
    assert flag.reason == "the time limit"
    now[0] = 80.0
    budget()
    assert ended == []
    now[0] = 91.0
    budget()
    assert ended == [1]
    other = StopFlag()
    (tmp_path / "stop").touch()
    stop.on_file(other, tmp_path / "stop", "asked")()
    assert other.reason == "asked"


def test_a_process_whose_launcher_is_killed_asks_to_stop() -> None:
    rank = (
        "import os, sys\n"
        "from dist_lm import stop\n"
        "flag = stop.StopFlag()\n"
        "duty = stop.on_orphaned(flag, grandparent=False)\n"
        "duty(); print('calm' if not flag.reason else flag.reason, flush=True)\n"
        "sys.stdin.readline()\n"
        "duty(); print(flag.reason, flush=True)\n"
    )
    launcher = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {rank!r}]).wait()"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "calm\n"
    process.kill()
    process.wait()
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stdout.readline() == "the launcher is gone\n"
    process.stdin.close()
    process.stdout.close()


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(second: signal.Signals) -> None:
    rank = (
        "import threading\n"
        "from dist_lm.stop import StopFlag\n"
        "flag = StopFlag(); flag.listen(); print('listens', flush=True)\n"
        "while not flag.reason: threading.Event().wait(0.01)\n"
        "print(flag.reason, flush=True)\n"
        "threading.Event().wait()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "listens\n"
    process.send_signal(signal.SIGTERM)
    # It goes on: a step is to be finished, and a checkpoint to be saved.
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(second)
    assert process.wait() == 128 + second
    process.stdout.close()


def test_bad_steps_in_a_row_lead_back_and_single_ones_do_not() -> None:
    guard = DivergenceGuard(bad_steps=3, spike_mads=0.0)
    seen = [guard.see(applied=applied) for applied in (True, False, False, True, False, False, False)]
    assert seen == [False, False, False, False, False, False, True]


def test_a_spike_is_measured_against_the_recent_median() -> None:
    guard = DivergenceGuard(bad_steps=2, spike_mads=8.0)
    for step in range(LEAST):
        assert not guard.see(applied=True, loss=2.0 + 0.1 * (step % 3))
    assert not guard.see(applied=True, loss=2.5)
    assert guard.bad_in_row == 0
    assert not guard.see(applied=True, loss=9.0)
    copy = DivergenceGuard(bad_steps=2, spike_mads=8.0)
    copy.restore(guard.state())
    for same in (guard, copy):
        assert same.see(applied=True, loss=math.nan)


def test_spikes_are_left_alone_unless_asked_for() -> None:
    guard = DivergenceGuard(bad_steps=1, spike_mads=0.0)
    assert not any(guard.see(applied=True, loss=loss) for loss in [2.0] * 40 + [1e6])


def test_the_best_evaluation_and_the_end_of_patience() -> None:
    section = EarlyStopSection(metric="mlm_loss", patience=2, min_delta=0.1)
    early = Selection(section, key="run.early_stop")
    told = [early.see({"mlm_loss": value}) for value in (3.0, 2.5, 2.45, 2.39)]
    assert told == [True, True, False, True]
    assert not early.exhausted
    resumed = Selection(section, key="run.early_stop")
    early.see({"mlm_loss": math.nan})
    resumed.restore(early.state())
    resumed.see({"mlm_loss": 2.38})
    assert resumed.exhausted
    accuracy = Selection(BestSection(metric="nsp_accuracy"), key="run.best")
    assert [accuracy.see({"nsp_accuracy": value}) for value in (0.5, 0.4, 0.6)] == [True, False, True]
    assert not accuracy.exhausted


def test_an_unknown_figure_is_named_with_those_that_exist() -> None:
    with pytest.raises(ConfigError, match="no figure `f1`") as caught:
        Selection(BestSection(metric="f1"), key="run.best").see({"loss": 1.0, "mlm_loss": 1.0})
    assert caught.value.why == "It has: loss, mlm_loss."


def test_faults_are_armed_by_place_rank_step_and_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    monkeypatch.setenv("DIST_LM_FAULT", "nan@rank1:step4:in_loss")
    assert not fault_point("in_loss", rank=0, step=4)
    assert not fault_point("in_loss", rank=1, step=5)
    assert not fault_point("in_loss", rank=1, step=4, attempt=2)
    assert [fault_point("in_loss", rank=1, step=4) for _ in range(2)] == ["nan", ""]
    monkeypatch.setenv("DIST_LM_FAULT", "oom@rank*:step*:in_forward:always")
    for step in (8, 9):
        with pytest.raises(MemoryError):
            fault_point("in_forward", rank=7, step=step, attempt=5)
    monkeypatch.setenv("DIST_LM_FAULT", "kill@rank1:step4:nowhere")
    with pytest.raises(ConfigError, match="names no place"):
        fault_point("in_loss", rank=0, step=1)
