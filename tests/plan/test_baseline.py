"""The measurement of what a rank holds before it has a model: where it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

import pytest

from dist_lm.errors import EnvironmentFault
from dist_lm.plan import baseline

pytestmark = pytest.mark.fast


def test_a_measurement_that_is_killed_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baseline, "_measure", _killed)
    # The fork server would load torch first.
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr("multiprocessing.get_context", lambda _method: spawn)
    with pytest.raises(EnvironmentFault, match="measures the memory of libraries ended with code -9"):
        baseline.process_bytes()


def _killed(answer: Connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
