"""A checkpoint exists or it does not: find, verify, publish, prune.

Enters: a store, and what the ranks report to have written.  Leaves: one published checkpoint more.
Promises: a checkpoint that is found is complete and of this run; a damaged one is found by its
hashes, set aside under a name that says so, and the one before it is taken; the only verified one and
the best one are never removed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm.checkpoint.manifest import MANIFEST, Checkpoint, Progress, manifest_bytes
from dist_lm.checkpoint.store import PREFIX, Draft, LocalStore, Store, step_name
from dist_lm.errors import DataError

if TYPE_CHECKING:
    from dist_lm.checkpoint.nearest import LocalCopies
    from dist_lm.ranks import Ranks

BEST = "BEST.json"


@dataclass(frozen=True)
class Retention:
    """Which checkpoints stay."""

    keep: int
    """The newest ones."""
    keep_every: int = 0
    """Those of a step that is a multiple of this; 0: none."""


def published(root: Path) -> list[Path]:
    """Checkpoint folders of a local root, newest first."""
    return [root / name for name in LocalStore(root).names()]


def step_of(name: str) -> int:
    return int(name.removeprefix(PREFIX))


def best(store: Store) -> dict[str, Any] | None:
    """step, metric and value of the best checkpoint; None where nothing is marked."""
    content = store.read_pointer(BEST)
    found: dict[str, Any] | None = json.loads(content) if content else None
    return found


def publish(
    store: Store,
    draft: Draft,
    progress: Progress,
    run_id: str,
    reports: Sequence[dict[str, Any]],
    reached: Callable[[str], None],
) -> None:
    """Publish the draft that all ranks have written.  May be called again after an OSError."""
    reached("before_manifest")
    manifest = manifest_bytes(progress, run_id, reports)
    reached("before_publish")
    store.publish(draft, MANIFEST, manifest)
    reached("after_publish")


def tidy(store: Store, mark_best: dict[str, Any] | None, retention: Retention, reached: Callable[[str], None]) -> None:
    """Mark the best checkpoint, prune the others.  May be called again after an OSError."""
    if mark_best is not None:
        store.write_pointer(BEST, (json.dumps(mark_best, sort_keys=True) + "\n").encode())
    reached("before_prune")
    prune(store, retention)
    reached("after_prune")


def prune(store: Store, retention: Retention) -> list[str]:
    """Remove what retention does not keep; called after a newer one was published.  Returns names."""
    marked = best(store)
    kept = {step_name(int(marked["step"]))} if marked else set()
    removed = []
    for name in store.names()[retention.keep :]:
        every = retention.keep_every and step_of(name) % retention.keep_every == 0
        if name not in kept and not every:
            store.remove(name)
            removed.append(name)
    return removed


def newest_verified(
    store: Store,
    ranks: Ranks,
    run_id: str,
    *,
    before_step: int | None = None,
    copies: LocalCopies | None = None,
    tell_bad: Callable[[str, str], None] = lambda _name, _problem: None,
) -> Checkpoint | None:
    """The newest checkpoint whose every byte is as it was written; a collective call.

    Each rank hashes its share of the files.  A bad checkpoint is set aside and named in the log.
    `before_step`: only of steps below.  `copies`: read from where they are good; those of other
    checkpoints are removed.  `tell_bad`: called on rank 0 with the name of a bad one and what is wrong
    with it, before it is set aside.  None where there is none.  Raises DataError where all that the run
    saved is damaged.
    """
    candidates = [name for name in ranks.agree(store.names) if before_step is None or step_of(name) < before_step]
    for name in candidates:
        checkpoint, problems = _verified(store, name, ranks, run_id, copies)
        if not problems:
            if copies:
                copies.forget_others(name)
            return checkpoint
        if ranks.is_first:
            tell_bad(name, problems[0])
            store.set_aside(name, problems[0])
    if candidates and before_step is None:
        raise DataError(
            f"none of the {len(candidates)} checkpoints of this run can be trusted",
            where=store.location,
            why="Each is set aside under a name that begins with .bad-.",
            do="Restore one from a copy, or start again in an empty run folder.",
        )
    if copies:
        copies.forget_others("")
    return None


def _verified(
    store: Store, name: str, ranks: Ranks, run_id: str, copies: LocalCopies | None
) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint, and what the ranks find wrong with it."""
    found: list[Checkpoint] = []

    def read() -> str:
        checkpoint = Checkpoint.read(store, name)
        found.append(checkpoint)
        return "" if checkpoint.run_id == run_id else f"its manifest is of another run ({checkpoint.run_id})"

    if problems := _problems(ranks, read):
        return None, problems
    (checkpoint,), files = found, sorted(found[0].files)
    if copies:
        checkpoint, files = copies.near(checkpoint)
    return checkpoint, _problems(ranks, lambda: checkpoint.damage(files[ranks.rank :: ranks.world_size]))


def _problems(ranks: Ranks, judge: Callable[[], str]) -> list[str]:
    """The verdicts of all ranks, but for the good ones, which are empty; a collective call."""
    try:
        verdict = judge()
    except DataError as error:
        verdict = f"{error.what}: {error.why}"
    except OSError as error:
        verdict = f"it cannot be read: {error}"
    return [problem for problem in ranks.gather(verdict) if problem]
