"""A rank as a process of this machine.

Enters: a configuration and the variables of one rank.  Leaves: a started process.
Promises: on the CPU every rank is forked from one server that has imported everything already, so
that a restart costs no imports; the rank is asked to stop when its launcher dies.

CUDA does not survive a fork, so that ranks with a GPU are started from nothing.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing import util
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from dist_lm.errors import EXIT_CRASH, DistLMError

PRELOADED = "dist_lm.cluster.preload"
"""The module that imports everything of training."""
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15
_FOLDER_BYTES = 107 - len("/pymp-12345678/listener-12345678")
"""The kernel allows 107 bytes for the name of a socket."""
_LOST = 255
"""What multiprocessing tells of a process whose server died."""


class RankProcess:
    """One rank; started when it is made."""

    def __init__(
        self, config: Path, overrides: Sequence[str], variables: Mapping[str, str], *, log: Path | None, fork: bool
    ) -> None:
        given = (str(config), list(overrides), dict(variables), str(log or ""))
        self._process: BaseProcess
        if fork:
            self._process = fork_server().Process(target=_main, args=given)
        else:
            self._process = multiprocessing.get_context("spawn").Process(target=_main, args=given)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it lives."""
        code = self._process.exitcode
        return EXIT_CRASH if code == _LOST else code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def end(self) -> None:
        """SIGKILL, unless it is gone already."""
        if self.poll() is None:
            self._process.kill()
        self._process.join()


def fork_server() -> ForkServerContext:
    """The context whose processes are forked from the one that has imported everything."""
    _choose_folder()
    multiprocessing.set_forkserver_preload([PRELOADED])
    return multiprocessing.get_context("forkserver")


def _choose_folder() -> None:
    """Of the server's socket.  It lies in the folder for temporary files, whose name may be too long for a socket's."""
    chosen = tempfile.gettempdir()
    if len(os.fsencode(chosen)) <= _FOLDER_BYTES:
        return
    tempfile.tempdir = "/tmp"
    try:
        # What it returns once it returns always, and removes at the end.
        util.get_temp_dir()
    finally:
        tempfile.tempdir = chosen


def _main(config: str, overrides: list[str], variables: dict[str, str], log: str) -> None:
    """What the new process runs."""
    prctl = ctypes.CDLL(None).prctl
    # When the launcher is killed, its server ends, and each rank is asked to stop, and saves.
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(_PR_SET_NAME, f"dist-lm rank {variables['RANK']}".encode())
    # Ctrl-C reaches the whole terminal group: only the launcher passes it on.
    os.setpgrp()
    os.environ.update(variables)
    if log:
        descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    from dist_lm.deepspeed_config import load_run
    from dist_lm.worker import run_rank

    try:
        loaded = load_run(Path(config), overrides)
    except DistLMError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(run_rank(loaded, launcher="local"))
