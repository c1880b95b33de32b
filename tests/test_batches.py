"""This rank's batches: made ahead by a thread, in order, with the errors of whatever made them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dist_lm.batches import LocalBatches
from dist_lm.data.handover import Handover
from dist_lm.data.rows import Rows, StepRows
from dist_lm.errors import DataError
from dist_lm.mesh import Mesh
from dist_lm.schedule import BatchPlan
from dist_lm.tasks.base import MicroBatch

pytestmark = pytest.mark.fast
PLAN = BatchPlan.divide(1, 1, 1)


def never() -> bool:
    return False


class Reader:
    """A stream of `steps` steps of one row, and then an error."""

    def __init__(self, steps: int) -> None:
        self.left, self.position, self.closed = steps, 0, False

    def next_rows(self, give_up: Callable[[], bool]) -> StepRows | None:
        if not self.left:
            raise DataError("the shard is damaged")
        self.left -= 1
        self.position += 1
        rows = Rows({}, np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, bool))
        return StepRows(self.position - 1, self.position, rows)

    def close(self) -> None:
        self.closed = True


class Waiting(Reader):
    """A stream whose storage does not answer."""

    def __init__(self) -> None:
        super().__init__(0)
        self.rows: Handover[StepRows] = Handover()

    def next_rows(self, give_up: Callable[[], bool]) -> StepRows | None:
        return self.rows.get(give_up)


class Counting:
    """A task whose micro-batches say in which thread they were made."""

    def divide(self, rows: Rows, plan: BatchPlan) -> list[Rows]:
        return [rows] * plan.micro_steps

    def collate(self, rows: Rows) -> MicroBatch:
        return MicroBatch({}, {"lm": threading.get_ident()}, 1, 1)


def batches_of(reader: Any) -> LocalBatches:
    task: Any = Counting()
    return LocalBatches(reader, task, PLAN, Mesh())


def test_batches_come_in_order_from_a_thread_of_their_own() -> None:
    with batches_of(Reader(3)) as batches:
        made = [batches.next(never) for _ in range(3)]
    assert [local.rows.position for local in made if local.rows] == [0, 1, 2]
    assert all(local.targets(["lm"]) != [threading.get_ident()] for local in made)


def test_an_error_follows_the_batches_before_it_and_stays() -> None:
    reader = Reader(1)
    with batches_of(reader) as batches:
        assert batches.next(never).rows is not None
        for _ in range(2):
            failed = batches.next(never)
            assert "the shard is damaged" in str(failed.failure)
            assert not failed.is_idle
    assert reader.closed


def test_whoever_gives_up_gets_an_idle_batch_and_closing_waits_for_no_storage() -> None:
    before = threading.active_count()
    with batches_of(Waiting()) as batches:
        assert batches.next(lambda: True).is_idle
    assert threading.active_count() == before
