"""What a person sees of a run: a line a record, or a view on a terminal."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console as Terminal

from dist_lm import console
from dist_lm.console import Console, Scene, progress_line

pytestmark = pytest.mark.fast
VALUES = {
    **{"loss": 7.0, "mlm_loss": 6.25, "nsp_loss": 0.75, "mlm_accuracy": 0.125, "step_seconds": 0.5},
    **{"data_seconds": 0.05, "forward_seconds": 0.2, "backward_seconds": 0.2, "optimizer_seconds": 0.05},
    **{"padding_share": 0.1, "memory_gib": 1.5, "learning_rate": 1e-3, "grad_norm": 2.0, "tokens_per_second": 12345.0},
}


class Clock:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_without_a_terminal_a_record_is_a_line_with_the_time_that_is_left(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dist_lm")
    clock = Clock()
    shown = Console(Scene("mlm", 100, 20, lambda: ("step", 31, 0.0)), live=False, clock=clock)
    clock.now += 60.0
    shown.trained(40, VALUES)
    shown.evaluated(40, {"loss": 6.5, "f1": 0.5}, 2.0, best=True)
    shown.saved(41, "step-00000040", 2_000_000, 0.5)
    shown.close()
    line, evaluated, saved = told(caplog)
    assert line.startswith("step 40/100 40.0%  loss 7.0000  mlm_loss 6.2500  nsp_loss 0.7500  mlm_accuracy 0.1250")
    # 20 steps of this attempt took a minute; 60 are left.
    assert line.endswith("12.3k tok/s  mem 1.50G  data 10.0%  eta 3.0 min")
    assert evaluated == "step 40  eval  loss 6.5000  f1 0.5000  best so far  (2.0 s)"
    assert saved == "step 41  saved step-00000040, 2.0 MB in 0.50 s"


def test_the_only_objective_is_told_once_and_rates_where_they_are_known() -> None:
    one = {name: value for name, value in VALUES.items() if name != "nsp_loss"}
    line = progress_line(1, 10, {**one, "tflops": 123.456, "mfu": 0.4321})
    assert "mlm_loss" not in line
    assert "12.3k tok/s  123 TFLOP/s a rank  MFU 43.2%" in line
    assert "eta" not in line


def test_the_view_shows_the_last_record_and_where_the_loop_is() -> None:
    clock, place = Clock(), ["step", 41, 0.2]
    shown = Console(Scene("mlm  2 x cpu", 100, 20, lambda: tuple(place)), live=False, clock=clock)  # type: ignore[arg-type,return-value]
    clock.now += 60.0
    shown.trained(30, {**VALUES, "loss": 8.0})
    shown.trained(40, VALUES)
    shown.evaluated(40, {"loss": 6.5}, 2.0, best=False)
    shown.saved(40, "step-00000040", 2_000_000, 0.5)
    clock.now += 30.0
    place[:] = ["checkpoint", 40, 4.0]
    lines = drawn(shown)
    assert " ".join(lines[0].split()) == "mlm 2 x cpu step 40 of 100 40.0% 1.5 min so far, 3.0 min to go"
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines[2:]}
    assert list(rows) == ["loss", "held-out", "rate", "time", "memory", "optimizer", "saved", "now"]
    assert rows["time"] == "waiting for data 10%  forward 40%  backward 40%  optimizer 10%"
    assert rows["saved"] == "step-00000040, 2.0 MB in 0.50 s, 30 s ago"
    assert rows["now"] == "checkpoint, for 4 s"
    assert rows["held-out"] == "step 40  loss 6.5000"


def test_before_the_first_record_the_view_says_what_the_loop_does() -> None:
    shown = Console(Scene("mlm", 100, 0, lambda: ("data", 1, 12.0)), live=False)
    assert drawn(shown)[2:] == ["now  data, for 12 s"]


def drawn(shown: Console) -> list[str]:
    terminal = Terminal(file=io.StringIO(), width=120)
    terminal.print(shown._view())
    assert isinstance(terminal.file, io.StringIO)
    return [line.rstrip() for line in terminal.file.getvalue().splitlines()]


def test_the_losses_so_far_are_drawn_from_the_lowest_to_the_highest_and_what_is_not_finite_is_left_out() -> None:
    assert console._sparks([4.0, 8.0, float("nan"), 1.0]) == "\u2584\u2588\u2581"
    assert console._sparks([1.0]) == console._sparks([1.0, 1.0]) == ""


@pytest.mark.parametrize("name", ["TERM", "TTY_COMPATIBLE"])
def test_a_file_and_a_terminal_that_cannot_draw_get_lines(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class File(io.StringIO):
        terminal = False

        def isatty(self) -> bool:
            return self.terminal

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("TTY_COMPATIBLE", raising=False)
    # It makes rich take every file for a terminal.
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = File()
    monkeypatch.setattr("sys.stdout", file)
    assert not console.on_terminal()
    file.terminal = True
    assert console.on_terminal()
    monkeypatch.setenv(name, {"TERM": "dumb", "TTY_COMPATIBLE": "0"}[name])
    assert not console.on_terminal()
