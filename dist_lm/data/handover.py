"""Items from a thread that reads to a loop that may lose its patience.

Enters: an iterator that may wait for storage.  Leaves: its items, in order, read ahead.
Promises: at most `limit` items wait; an error of the reader reaches the consumer after the items that
came before it; a consumer that is told to give up gets away within a moment, whatever the reader
waits for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
READ_AHEAD = 2
"""Batches that wait for the consumer at most."""
_LOOK_S = 0.2
"""Between two looks whether to give up."""


def _never() -> bool:
    return False


class Handover(Generic[T]):
    """A bounded queue between one reader and its consumer, either of which may end it."""

    def __init__(self, limit: int = READ_AHEAD) -> None:
        self._limit = limit
        self._changed = threading.Condition()
        self._items: deque[T] = deque()
        self._error: BaseException | None = None
        self.closed = False

    def fill(self, items: Iterator[T]) -> None:
        """What the reader thread does: to the end of the items, or until nobody wants more."""
        try:
            for item in items:
                if not self._put(item):
                    return
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def start(self, items: Iterator[T], name: str) -> threading.Thread:
        """Read in a thread.  A daemon: a read that hangs must not keep a finished process alive."""
        thread = threading.Thread(target=self.fill, args=(items,), name=name, daemon=True)
        thread.start()
        return thread

    def _put(self, item: T) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self.closed or len(self._items) < self._limit)
            if not self.closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self.closed

    def get(self, give_up: Callable[[], bool] = _never) -> T | None:
        """The next item; None: there is none yet, and `give_up` says not to wait for it."""
        with self._changed:
            while not self._changed.wait_for(self._is_ready, timeout=_LOOK_S):
                if give_up():
                    return None
            if self.closed:
                raise RuntimeError("the stream is closed")
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            assert self._error is not None
            raise self._error

    def _is_ready(self) -> bool:
        return self.closed or bool(self._items) or self._error is not None

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._items.clear()
            self._changed.notify_all()
