"""What a rank says, kept in the run folder.

Enters: records of the logger `dist_lm`.  Leaves: logs/rank-NNNNN.log, which grows over all attempts.
Promises: a line is in the file when the next one is said.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from dist_lm.disk import disk_errors

_LOGGER = "dist_lm"
_POLL_S = 0.2


def log_file(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank:05d}.log"


class RunLog:
    """Open until `close`; a process may keep one run's log after the other."""

    def __init__(self, logs: Path, rank: int) -> None:
        with disk_errors(logs):
            self._handler = logging.FileHandler(log_file(logs, rank))
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        logging.getLogger(_LOGGER).addHandler(self._handler)

    def close(self) -> None:
        logging.getLogger(_LOGGER).removeHandler(self._handler)
        self._handler.close()


def tail(path: Path, count: int, *, until: Callable[[], bool] | None = None) -> Iterator[str]:
    """The last `count` lines, all for 0; with `until`, then what is added, until it says so and all is read."""
    with path.open(encoding="utf-8", errors="replace") as file:
        yield from (line.rstrip("\n") for line in deque(file, maxlen=count or None))
        while until is not None:
            ended = until()
            yield from (line.rstrip("\n") for line in file)
            if ended:
                return
            time.sleep(_POLL_S)
