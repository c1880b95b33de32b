"""The corpus of documentation and its task: nothing to read, nothing to tell apart, a worker that dies."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from dist_lm.data.corpus_docs import write_docs_corpus
from dist_lm.data.package_task import write_package_task
from dist_lm.data.process_pool import ordered_map
from dist_lm.errors import DataError, EnvironmentFault

pytestmark = pytest.mark.fast


def test_folders_without_documentation_make_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "bare.py").write_text("x = 1\n")
    with pytest.raises(DataError, match="no documentation was found"):
        write_docs_corpus(tmp_path / "corpus.jsonl", workers=1, roots=[(tmp_path, None)])
    assert not (tmp_path / "corpus.jsonl").exists()


def test_a_corpus_of_one_package_makes_no_task(tmp_path: Path) -> None:
    corpus, line = (
        tmp_path / "corpus.jsonl",
        {"text": "A text that is long enough to be told apart. " * 9, "package": "a"},
    )
    corpus.write_text(json.dumps(line) + "\n")
    with pytest.raises(DataError, match=r"the corpus is about 1 package\(s\)"):
        write_package_task(corpus, tmp_path / "task.jsonl")
    corpus.write_text("{}\n")
    with pytest.raises(DataError, match="this is not a documentation corpus"):
        write_package_task(corpus, tmp_path / "task.jsonl")
    assert not (tmp_path / "task.jsonl").exists()


def test_a_worker_that_is_killed_is_an_error_and_no_hang() -> None:
    with pytest.raises(EnvironmentFault, match="a worker process died while dying") as caught:
        list(ordered_map(_die, [signal.SIGKILL], workers=2, doing="dying"))
    assert "fewer than 2 workers" in caught.value.do


def _die(number: int) -> None:
    os.kill(os.getpid(), number)
