"""What the first rank tells a person while it trains.

Enters: records, evaluations, saved checkpoints.  Leaves: on a terminal a view that is drawn anew twice a
second; elsewhere, as in the logs of Ray or Kubernetes, one line a record.
Promises: the loop never waits for the view; where a process is killed the terminal stays usable; the
log of the run folder has the lines in any case.
"""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console as Terminal
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_lm.duration import spoken

log = logging.getLogger(__name__)
_DRAWN_A_SECOND = 2
_SPARKS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
_MOST_SPARKS = 40
_PARTS = {"data": "waiting for data", "forward": "forward", "backward": "backward", "optimizer": "optimizer"}


@dataclass(frozen=True)
class Scene:
    """What stays the same during an attempt."""

    title: str
    steps: int
    resumed_step: int
    place: Callable[[], tuple[str, int, float]]
    """Section of the loop, its step, and the seconds that it has taken so far."""


class Console:
    """Of one rank.  On all but the first nothing is shown: they speak at WARNING (worker.py)."""

    def __init__(self, scene: Scene, *, live: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._scene, self._clock = scene, clock
        self._began_at = clock()
        self._step, self._values, self._timed = scene.resumed_step, dict[str, float](), (scene.resumed_step, 0.0)
        self._losses: deque[float] = deque(maxlen=_MOST_SPARKS)
        self._heldout = self._saved = ""
        self._saved_at = 0.0
        self._live: Live | None = None
        if live:
            self._live = Live(
                console=Terminal(file=sys.stdout),
                get_renderable=self._view,
                refresh_per_second=_DRAWN_A_SECOND,
                transient=True,
            )
            self._live.start()
            # A rank that is killed could not show it again.
            self._live.console.show_cursor(True)

    def trained(self, step: int, values: Mapping[str, float]) -> None:
        """A record of the steps up to `step`."""
        self._step, self._values = step, dict(values)
        self._timed = (step, self._clock() - self._began_at)
        self._losses.append(values["loss"])
        line = progress_line(step, self._scene.steps, values, self._left_s())
        log.info("%s", line, extra={"drawn": self._live is not None})

    def evaluated(self, step: int, figures: Mapping[str, float], seconds: float, *, best: bool) -> None:
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        self._heldout = f"step {step}  {shown}"
        log.info("step %d  eval  %s%s  (%.1f s)", step, shown, "  best so far" if best else "", seconds)

    def saved(self, step: int, name: str, num_bytes: int, seconds: float) -> None:
        """A checkpoint is published.  `step`: where the loop is by now."""
        self._saved, self._saved_at = f"{name}, {num_bytes / 1e6:.1f} MB in {seconds:.2f} s", self._clock()
        log.info("step %d  saved %s", step, self._saved)

    def close(self) -> None:
        """Take the view off the terminal."""
        if self._live is not None:
            self._live.stop()

    def _left_s(self) -> float | None:
        """Seconds to the last step, at the mean speed of this attempt so far; None before its first record."""
        step, took_s = self._timed
        done = step - self._scene.resumed_step
        return took_s / done * (self._scene.steps - step) if done > 0 else None

    def _view(self) -> RenderableType:
        section, step, since_s = self._scene.place()
        done = step if section in ("evaluation", "checkpoint") else max(step - 1, self._scene.resumed_step)
        left_s, steps = self._left_s(), self._scene.steps
        took = f"{spoken(self._clock() - self._began_at)} so far"
        head = Table.grid(expand=True)
        head.add_column(ratio=1, no_wrap=True)
        head.add_column(justify="right", no_wrap=True)
        head.add_row(
            Text(self._scene.title, style="bold"),
            f"step {done:,} of {steps:,}  {done / steps:.1%}  {took}"
            + (f", {spoken(left_s)} to go" if left_s is not None else ""),
        )
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column(overflow="fold")
        for name, words in self._rows(section, since_s):
            rows.add_row(name, Text(words))
        bar = Table.grid(expand=True)
        bar.add_row(ProgressBar(total=steps, completed=done))
        return Group(head, bar, rows)

    def _rows(self, section: str, since_s: float) -> list[tuple[str, str]]:
        values = self._values
        now = f"{section}, for {spoken(since_s)}" if since_s >= 1 or not values else section
        if not values:
            return [("now", now)]
        rows = [("loss", f"{_losses(values)}  {_sparks(self._losses)}".rstrip())]
        if self._heldout:
            rows.append(("held-out", self._heldout))
        step_s = values["step_seconds"]
        shares = [f"{words} {values[f'{name}_seconds'] / step_s:.0%}" for name, words in _PARTS.items()]
        rows += [
            ("rate", f"{_rate(values)}  {step_s:.3g} s a step  padding {values['padding_share']:.1%}"),
            ("time", "  ".join(shares)),
            ("memory", f"{values['memory_gib']:.2f} GiB at the peak, a rank"),
            ("optimizer", f"lr {values['learning_rate']:.2e}  gradient norm {values['grad_norm']:.2f}"),
            ("saved", f"{self._saved}, {spoken(self._clock() - self._saved_at)} ago" if self._saved else "nothing yet"),
            ("now", now),
        ]
        return rows


def on_terminal() -> bool:
    """Whether a view can be drawn: TERM=dumb and TTY_COMPATIBLE=0 forbid it."""
    terminal = Terminal(file=sys.stdout)
    return sys.stdout.isatty() and terminal.is_terminal and not terminal.is_dumb_terminal


def progress_line(step: int, steps: int, values: Mapping[str, float], left_s: float | None = None) -> str:
    """One record for a person."""
    waiting = values["data_seconds"] / values["step_seconds"]
    return (
        f"step {step}/{steps} {step / steps:.1%}  {_losses(values)}  lr {values['learning_rate']:.2e}  "
        f"gnorm {values['grad_norm']:.2f}  {_rate(values)}  mem {values['memory_gib']:.2f}G  data {waiting:.1%}"
        + (f"  eta {spoken(left_s)}" if left_s is not None else "")
    )


def _losses(values: Mapping[str, float]) -> str:
    shown = {name: value for name, value in values.items() if name.endswith(("_loss", "_accuracy"))}
    if sum(name.endswith("_loss") for name in shown) == 1:
        # The only objective: its loss is `loss`.
        shown = {name: value for name, value in shown.items() if not name.endswith("_loss")}
    return "  ".join(f"{name} {value:.4f}" for name, value in {"loss": values["loss"], **shown}.items())


def _rate(values: Mapping[str, float]) -> str:
    rate = f"{values['tokens_per_second'] / 1e3:.1f}k tok/s"
    if "tflops" in values:
        rate += f"  {values['tflops']:.3g} TFLOP/s a rank"
    return rate + (f"  MFU {values['mfu']:.1%}" if "mfu" in values else "")


def _sparks(values: Any) -> str:
    """A line of blocks, the highest value the tallest."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if len(finite) < 2 or min(finite) == max(finite):
        return ""
    if not (sys.__stdout__ and (sys.__stdout__.encoding or "").lower().startswith("utf")):
        return ""
    low, high = min(finite), max(finite)
    return "".join(_SPARKS[round((value - low) / (high - low) * (len(_SPARKS) - 1))] for value in finite)
