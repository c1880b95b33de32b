"""Killed anywhere, damaged anywhere, with any number of workers: the same bytes, and no work twice."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest

from dist_lm.data.preparation import map_task, reduce_task
from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import DataError
from tests.data.preparation.killed_at import prepare_until
from tests.data.preparation.preparing import TEXTS, files_of, options, write_lines
from tests.data.text_datasets import flip_bit
from tests.rank_scenarios import server_of_ranks

SETTINGS: dict[str, Any] = {"split_bytes": 120_000, "bucket_bytes": 250_000, "shard_rows": 600}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    records = [{"text": text, "label": f"l{number % 3}"} for number, text in enumerate([*TEXTS, *TEXTS[:50]])]
    return write_lines(tmp_path_factory.mktemp("source") / "texts.jsonl", records)


@pytest.fixture(scope="module")
def calm(source: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PrepareOptions:
    """An undisturbed preparation."""
    out = tmp_path_factory.mktemp("calm") / "data"
    made = options(source, tokenizer, out, kind="classification", **SETTINGS)
    prepare(made)
    return made


def run_killed(made: PrepareOptions, last: int, moment: str) -> int | None:
    process = server_of_ranks().Process(target=prepare_until, args=(last, moment, made))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("moment", ["before", "after"])
def test_killed_again_and_again_it_ends_with_the_same_bytes(calm: PrepareOptions, tmp_path: Path, moment: str) -> None:
    made = dataclasses.replace(calm, out=tmp_path / "data")
    kills = 0
    # Four files are written anew in each run: tokenizer, its configuration, job, parts.
    while (code := run_killed(made, 8, moment)) != 0:
        assert code == -signal.SIGKILL
        kills += 1
        assert kills < 40
    assert kills >= 3
    assert files_of(made.out) == files_of(calm.out)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many splits were packed, and how many shards were written, in this process."""
    counts = {"splits": 0, "shards": 0}
    run, write = map_task._Mapper.run, reduce_task._write

    def counted_run(self: Any) -> Any:
        counts["splits"] += 1
        return run(self)

    def counted_write(*arguments: Any) -> None:
        counts["shards"] += 1
        write(*arguments)

    monkeypatch.setattr(map_task._Mapper, "run", counted_run)
    monkeypatch.setattr(reduce_task, "_write", counted_write)
    return counts


def stop_at(made: PrepareOptions, stage: str, done: int) -> None:
    """Prepare until `done` tasks of a stage are finished."""

    class Enough(Exception):
        pass

    def progress(at: str, count: int, total: int | None) -> None:
        if at == stage and count == done:
            raise Enough

    with pytest.raises(Enough):
        prepare(made, progress=progress)


def test_what_is_done_and_whole_is_not_done_again(
    calm: PrepareOptions, tmp_path: Path, counted: dict[str, int]
) -> None:
    prepare(dataclasses.replace(calm, out=tmp_path / "whole"))
    whole = dict(counted)
    assert whole["splits"] > 3
    assert whole["shards"] > 3
    made = dataclasses.replace(calm, out=tmp_path / "data")
    stop_at(made, "tokenising", 2)
    prepare(made)
    assert counted["splits"] == 2 * whole["splits"]
    assert counted["shards"] == 2 * whole["shards"]
    assert files_of(made.out) == files_of(calm.out)


def test_a_part_or_shard_that_was_damaged_meanwhile_is_made_again(
    calm: PrepareOptions, tmp_path: Path, counted: dict[str, int]
) -> None:
    made = dataclasses.replace(calm, out=tmp_path / "data")
    stop_at(made, "writing shards", 2)
    before = dict(counted)
    (work,) = made.out.glob(".work-*")
    flip_bit(sorted(work.glob("map/*.batches"))[0], 100)
    sorted(work.glob("map/*.idx"))[1].unlink()
    flip_bit(sorted(made.out.glob("train/*.tar"))[0], 100)
    prepare(made)
    assert files_of(made.out) == files_of(calm.out)
    assert counted["splits"] in (before["splits"] + 1, before["splits"] + 2)
    assert counted["shards"] > before["shards"]


@pytest.mark.parametrize("workers", [2, 3])
def test_the_number_of_workers_changes_no_byte(calm: PrepareOptions, tmp_path: Path, workers: int) -> None:
    made = dataclasses.replace(calm, out=tmp_path / "data", workers=workers)
    stop_at(made, "tokenising", 1)
    prepare(made)
    assert files_of(made.out) == files_of(calm.out)


def test_an_error_in_a_worker_process_reaches_the_user(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "bad.jsonl", [{"text": text} for text in TEXTS[:50]] + [{"body": "x"}])
    with pytest.raises(DataError, match="1 bad record") as error:
        prepare(options(source, tokenizer, tmp_path / "data", workers=2, split_bytes=3000))
    assert error.value.where == f"{source}:51"
