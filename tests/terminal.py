"""A command on a terminal of its own, and what a person would see there.

Enters: a command line.  Leaves: its exit code, the screen at its end, and the screens in between.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyte

from tests.gloo_ranks import REPOSITORY, environment

_ROWS, _COLUMNS = 50, 140
_ERASURE = re.compile(rb"(?=\r\x1b\[(?:1A|2K))")
"""Begins what takes a view off the screen."""


@dataclass(frozen=True)
class Shown:
    """What was on the screen."""

    exit_code: int
    text: str
    """Every line at the end, those that were scrolled away too."""
    frames: list[str]
    cursor_hidden: bool

    def frames_with(self, words: str) -> list[str]:
        return [frame for frame in self.frames if words in frame]


def run_on_terminal(
    words: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    limit_s: float = 240,
    draw: Callable[[pyte.Screen], str] | None = None,
) -> Shown:
    """Run to the end; a hang is an error after `limit_s`.  `draw`: what a frame holds; None: its lines."""
    draw = draw or _lines
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    process = subprocess.Popen(
        [str(word) for word in words],
        env=environment({"TERM": "xterm-256color", "LANG": "C.UTF-8", **(env or {})}),
        cwd=REPOSITORY,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    screen = pyte.HistoryScreen(_COLUMNS, _ROWS, history=2000)
    stream, frames = pyte.ByteStream(screen), list[str]()
    deadline = time.monotonic() + limit_s
    while chunk := _read(ours, deadline - time.monotonic()):
        # What is drawn and taken away by one write was on the screen, too: each run's last view.
        for piece in _ERASURE.split(chunk):
            stream.feed(piece)
            frames.append(draw(screen))
    os.close(ours)
    if process.poll() is None and time.monotonic() >= deadline:
        process.terminate()
    code = process.wait(60)
    scrolled = ["".join(line[column].data for column in range(_COLUMNS)).rstrip() for line in screen.history.top]
    return Shown(code, "\n".join([*scrolled, _lines(screen)]), frames, screen.cursor.hidden)


def _read(descriptor: int, seconds: float) -> bytes:
    """What the command wrote; empty once nobody can write any more, or after `seconds`."""
    if not select.select([descriptor], [], [], max(seconds, 0.0))[0]:
        return b""
    try:
        return os.read(descriptor, 65536)
    except OSError:
        # Linux's way to say that the last writer has closed a terminal.
        return b""


def _lines(screen: pyte.Screen) -> str:
    return "\n".join(line.rstrip() for line in screen.display)
