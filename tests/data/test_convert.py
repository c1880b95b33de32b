"""Sources as .jsonl: what prepare reads, and files that run in parallel."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from dist_lm.data.convert import convert_records, pair_lines
from dist_lm.data.sources.format import ReadSettings
from dist_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.fast


def test_conll_and_squad_become_records(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("John B-PER\nsleeps O\n\nhere O\n")
    assert convert_records([str(tmp_path / "a.conll")], ReadSettings(), tmp_path / "a.jsonl") == (2, 0)
    first, second = map(json.loads, (tmp_path / "a.jsonl").read_text().splitlines())
    assert first == {"tokens": ["John", "sleeps"], "tags": ["B-PER", "O"]}
    assert second["tokens"] == ["here"]
    with pytest.raises(ConfigError, match="exists already"):
        convert_records([str(tmp_path / "a.conll")], ReadSettings(), tmp_path / "a.jsonl")


def test_lines_become_pairs_and_a_bad_pair_is_counted(tmp_path: Path) -> None:
    (tmp_path / "x.en").write_bytes(b"one\ntwo\nthree\n")
    (tmp_path / "x.de.gz").write_bytes(gzip.compress(b"eins\n\ndrei\n"))
    files = (str(tmp_path / "x.en"), str(tmp_path / "x.de.gz"))
    with pytest.raises(DataError, match=r"x\.en:2: field 'target' is empty"):
        pair_lines(*files, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    assert pair_lines(*files, tmp_path / "out.jsonl", max_bad=1) == (2, 1)
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()] == [
        {"source": "one", "target": "eins"},
        {"source": "three", "target": "drei"},
    ]


@pytest.mark.parametrize(("left", "right"), [("a\nb\nc\n", "x\n"), ("a\n", "x\ny\nz\n")])
def test_files_that_do_not_run_in_parallel_are_refused_with_both_counts(tmp_path: Path, left: str, right: str) -> None:
    (tmp_path / "left").write_text(left)
    (tmp_path / "right").write_text(right)
    counts = rf"first has {left.count(chr(10))} lines, the second {right.count(chr(10))}"
    with pytest.raises(DataError, match=counts):
        pair_lines(str(tmp_path / "left"), str(tmp_path / "right"), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
