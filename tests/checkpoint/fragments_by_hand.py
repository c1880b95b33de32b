"""Fragments without an engine, and one-process ranks, for tests of the checkpoint's files."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from dist_lm.checkpoint.commit import Retention
from dist_lm.checkpoint.fragments import WEIGHT, Fragment
from dist_lm.checkpoint.manifest import Progress
from dist_lm.checkpoint.store import Store
from dist_lm.checkpoint.writer import Writer
from dist_lm.ranks import Ranks

RUN_ID = "run-a"
SHAPES = {"a.weight": (6, 5), "b.bias": (7,)}


def ranks(rank: int = 0, world_size: int = 1) -> Ranks:
    """A rank that never calls a collective."""
    return Ranks(rank, rank, world_size, torch.device("cpu"), None)


def values(name: str, key: str, step: int) -> torch.Tensor:
    """The whole flattened parameter or state at a step."""
    size = torch.Size(SHAPES[name]).numel()
    return torch.arange(size, dtype=torch.float32) * (2 if key == WEIGHT else 3) + step * 1000


def fragments(rank: int, world_size: int, step: int) -> Callable[[], Iterator[Fragment]]:
    """What a rank owns: an equal share of each parameter."""

    def own() -> Iterator[Fragment]:
        for name, shape in SHAPES.items():
            size = torch.Size(shape).numel()
            start, end = size * rank // world_size, size * (rank + 1) // world_size
            tensors = {key: values(name, key, step)[start:end] for key in (WEIGHT, "exp_avg")}
            yield Fragment(name, shape, start, tensors)

    return own


def progress(step: int) -> Progress:
    return Progress(step=step, position=step * 8, data_fingerprint="data")


def writer(
    store: Store, rank: int = 0, world_size: int = 1, *, keep: int = 5, attempt: int = 1, **options: object
) -> Writer:
    return Writer(
        store,
        ranks(rank, world_size),
        run_id=RUN_ID,
        attempt=attempt,
        retention=Retention(keep),
        pauses_s=(0.0, 0.0),
        **options,  # type: ignore[arg-type]
    )


def save(store: Store, step: int, *, world_size: int = 2, keep: int = 5, attempt: int = 1) -> None:
    """Publish a checkpoint of all ranks, or fail with what went wrong."""
    writers = [writer(store, rank, world_size, keep=keep, attempt=attempt) for rank in range(world_size)]
    for rank, one in enumerate(writers):
        one.start(progress(step), fragments(rank, world_size, step))
    for one in writers:
        one._join()
        assert one.error is None, one.error
    assert [done.step for done in writers[0].take_published()] == [step]
