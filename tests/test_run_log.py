"""Logs of a run stay in its folder, and `dist-lm logs` shows them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.errors import ConfigError
from dist_lm.run_dir import RunDir
from dist_lm.run_log import RunLog, log_file, tail

pytestmark = pytest.mark.fast


def test_what_is_said_between_opening_and_closing_is_kept_over_attempts(tmp_path: Path) -> None:
    log = logging.getLogger("dist_lm.train")
    log.setLevel(logging.INFO)
    for attempt in (1, 2):
        kept = RunLog(tmp_path, 0)
        log.info("attempt %d", attempt)
        kept.close()
        log.info("nobody keeps this")
    lines = log_file(tmp_path, 0).read_text().splitlines()
    assert [line.split("dist_lm.train ")[1] for line in lines] == ["attempt 1", "attempt 2"]


def test_following_ends_with_the_run_and_misses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("1\n2\n3\n")
    said = iter(["4\n5\n", "6\n"])

    def ended() -> bool:
        more = next(said, None)
        with path.open("a") as file:
            file.write(more or "last\n")
        return more is None

    assert list(tail(path, 2, until=ended)) == ["2", "3", "4", "5", "6", "last"]
    assert list(tail(path, 0)) == ["1", "2", "3", "4", "5", "6", "last"]


def test_the_verb_shows_the_last_lines_and_where_the_tracebacks_are(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.begin()
    log_file(run_dir.logs, 1).write_text("one\ntwo\n")
    error = run_dir.write_error(1, 1, "error[data] a shard is damaged\n\nTraceback")
    done = CliRunner().invoke(app, ["logs", str(run_dir.path), "--rank", "1", "--lines", "1", "--follow"])
    assert done.output.splitlines() == ["two", f"{error}: error[data] a shard is damaged"]
    missing = CliRunner().invoke(app, ["logs", str(run_dir.path)])
    assert isinstance(missing.exception, ConfigError)
    assert "rank-00001" in missing.exception.do
