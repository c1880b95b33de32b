"""A pool of local processes that maps a function over items and gives the results in order.

Enters: an importable function and its items.  Leaves: its results, in the order of the items.
Promises: the results do not depend on the number of workers; a worker that dies is an error and not
a hang; workers end when their parent does, even when it is killed; each worker is one thread wide.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from dist_lm.errors import EnvironmentFault

Item = TypeVar("Item")
Result = TypeVar("Result")

Progress = Callable[[str, int, int | None], None]
"""Called with a stage, the units done, and the units in all (None: not known)."""

# Enough for every worker to have its next item at hand, few enough to keep memory flat.
_ITEMS_AHEAD_PER_WORKER = 3


def silent(stage: str, done: int, total: int | None) -> None:
    """The progress of somebody who does not look."""


def available_cores() -> int:
    """Cores that this process may run on; less than the machine has, in a container or under taskset."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ordered_map(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int, doing: str
) -> Generator[Result, None, None]:
    """Results of `function` in the order of `items`, computed by `workers` processes (1: this one).

    `function` must be importable and light to import.  Closing the iterator cancels what is ahead.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    # Spawned, not forked: a fork copies the locks of threads that do not exist in the child.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=start_worker)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers * _ITEMS_AHEAD_PER_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise EnvironmentFault(
            f"a worker process died while {doing}",
            why="The system killed it, most often for want of memory.",
            do=f"Run the same command again with fewer than {workers} workers.",
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def start_worker() -> None:
    """Runs in each worker before its first item."""
    # One worker a core: threads inside the Rust tokenizer would only fight over the cores.
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # Ctrl-C reaches the whole process group; the parent decides, and the workers finish their item.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # A worker waits on a pipe whose other end it holds itself: it would outlive a killed parent for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
