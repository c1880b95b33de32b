"""Background saves: what fails is tried again, then told; nothing half-written is published."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from dist_lm.checkpoint.fragments import WEIGHT
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.policy import SavePolicy
from dist_lm.checkpoint.reader import Reader
from dist_lm.checkpoint.snapshot import Snapshot
from dist_lm.checkpoint.store import Draft, LocalStore, step_name
from dist_lm.errors import EnvironmentFault
from dist_lm.lease import Fenced
from tests.checkpoint.fragments_by_hand import SHAPES, fragments, progress, ranks, values, writer

pytestmark = pytest.mark.fast


class FailingStore(LocalStore):
    """A folder on a disk that refuses the first writes, or is slow until told otherwise."""

    def __init__(self, root: Path, *, failures: int = 0, gate: threading.Event | None = None) -> None:
        super().__init__(root)
        self.failures, self.gate, self.writes = failures, gate, 0

    def write(self, draft: Draft, file: str, chunks: Iterable[bytes | memoryview]) -> None:
        self.writes += 1
        if self.gate:
            self.gate.wait()
        if self.failures:
            self.failures -= 1
            raise OSError(errno.ENOSPC, "No space left on device")
        super().write(draft, file, chunks)


def test_the_snapshot_holds_what_the_weights_were_while_training_goes_on(tmp_path: Path) -> None:
    gate = threading.Event()
    store = FailingStore(tmp_path, gate=gate)
    live = {(name, key): values(name, key, 1) for name in SHAPES for key in (WEIGHT, "exp_avg")}
    own = fragments(0, 1, 1)

    def of_live_tensors():  # type: ignore[no-untyped-def]
        for fragment in own():
            for key in fragment.tensors:
                fragment.tensors[key] = live[fragment.name, key]
            yield fragment

    saving = writer(store)
    saving.start(progress(1), of_live_tensors)
    for tensor in live.values():
        tensor.fill_(-1.0)
    gate.set()
    saving._join()
    assert saving.error is None
    reader = Reader(Checkpoint.read(store, step_name(1)))
    assert torch.equal(reader.weight("b.bias"), values("b.bias", WEIGHT, 1))


def test_one_buffer_is_used_again_for_each_save() -> None:
    snapshot = Snapshot(ranks().device)
    snapshot.take(fragments(0, 1, 1))
    first = snapshot._buffer.data_ptr()
    snapshot.take(fragments(0, 1, 2))
    assert snapshot._buffer.data_ptr() == first
    # The share of the fp32 state, and not a byte more.
    assert snapshot._buffer.numel() == sum(2 * values(name, WEIGHT, 1).numel() for name in SHAPES)


def test_a_disk_that_is_full_for_a_while_delays_the_checkpoint_only(tmp_path: Path) -> None:
    store = FailingStore(tmp_path, failures=2)
    saving = writer(store)
    saving.start(progress(1), fragments(0, 1, 1))
    saving._join()
    assert saving.error is None
    checkpoint = Checkpoint.read(store, step_name(1))
    assert checkpoint.damage(checkpoint.files) == ""


def test_a_disk_that_stays_full_is_an_error_and_never_a_checkpoint(tmp_path: Path) -> None:
    store = FailingStore(tmp_path, failures=99)
    saving = writer(store)
    saving.start(progress(1), fragments(0, 1, 1))
    saving._join()
    assert saving.error is not None
    assert saving.error.exit_code == 4
    assert "Tried 3 times" in saving.error.why
    assert "No space left" in saving.error.why
    assert store.names() == []
    assert saving.take_published() == []


def test_what_nobody_foresaw_is_an_error_that_names_the_checkpoint(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    saving = writer(store, fence=_broken)
    saving.start(progress(1), fragments(0, 1, 1))
    saving._join()
    assert isinstance(saving.error, EnvironmentFault)
    assert saving.error.what == f"checkpoint {step_name(1)} could not be written"
    assert saving.error.why == "ValueError('no lease is there')"
    assert store.names() == []


def _broken() -> None:
    raise ValueError("no lease is there")


def test_a_second_save_waits_for_the_first_so_that_memory_does_not_grow(tmp_path: Path) -> None:
    gate = threading.Event()
    store = FailingStore(tmp_path, gate=gate)
    saving = writer(store)
    saving.start(progress(1), fragments(0, 1, 1))
    second = threading.Thread(target=lambda: saving.start(progress(2), fragments(0, 1, 2)))
    second.start()
    # The second one cannot have begun: its first write would be counted before the gate opens.
    assert store.names() == []
    assert store.writes <= 1
    gate.set()
    second.join()
    saving._join()
    assert [done.step for done in saving.take_published()] == [1, 2]
    assert store.names() == [step_name(2), step_name(1)]


def test_a_rank_that_never_reports_keeps_the_checkpoint_from_being_published(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    first, second = writer(store, 0, 2), writer(store, 1, 2)
    first.start(progress(1), fragments(0, 2, 1))
    first._written.wait()
    assert store.names() == []
    second.start(progress(1), fragments(1, 2, 1))
    second._join()
    first._join()
    assert store.names() == [step_name(1)]


def test_abandoning_ends_a_thread_that_waits_for_a_dead_peer(tmp_path: Path) -> None:
    first = writer(LocalStore(tmp_path), 0, 2)
    first.start(progress(1), fragments(0, 2, 1))
    first.abandon()
    assert first.error is None
    assert LocalStore(tmp_path).names() == []


def test_an_attempt_that_lost_the_run_publishes_nothing(tmp_path: Path) -> None:
    def fence() -> None:
        raise Fenced("attempt 1 has lost the run to attempt 2")

    saving = writer(LocalStore(tmp_path), fence=fence)
    saving.start(progress(1), fragments(0, 1, 1))
    saving._join()
    assert isinstance(saving.error, Fenced)
    assert LocalStore(tmp_path).names() == []


def test_saves_are_due_by_steps_or_by_a_clock() -> None:
    by_steps = SavePolicy(3)
    assert [step for step in range(1, 10) if by_steps.is_due(step)] == [3, 6, 9]
    now = [0.0]
    by_clock = SavePolicy("1min30s", clock=lambda: now[0])
    now[0] = 89.0
    assert not by_clock.is_due(1)
    now[0] = 90.0
    assert by_clock.is_due(2)
    by_clock.saved()
    assert not by_clock.is_due(3)
