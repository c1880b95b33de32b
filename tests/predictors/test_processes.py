"""Several processes write what one writes, and find the same figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.errors import DataError
from dist_lm.judge import Slicing, judge_file
from dist_lm.predict import Request, predict_file
from tests.predictors.small_models import save_model, write_records


def test_two_processes_write_the_file_of_one(topics_data: Path, tmp_path: Path) -> None:
    folder = save_model("BertForTokenClassification", topics_data / "tokenizer", tmp_path / "model")
    records = [
        {"tokens": ["word"] * (1 + n % 5), "tags": ["B-PER"] + ["O"] * (n % 5), "n": n, "even": n % 2} for n in range(9)
    ]
    source = write_records(tmp_path / "in.jsonl", [*records, {"n": 9}])
    one, two = (Request(str(folder), str(source), ranks=ranks, max_bad=1) for ranks in (1, 2))
    assert predict_file(one, tmp_path / "one.jsonl") == predict_file(two, tmp_path / "two.jsonl") == (10, 1)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    slicing = Slicing(("even",), resamples=20, seed=1)
    assert judge_file(one, slicing) == judge_file(two, slicing)
    with pytest.raises(DataError, match=r"in\.jsonl:10: no field 'tokens'"):
        judge_file(Request(str(folder), str(source), ranks=2), slicing)
