"""Several processes write what one writes, and find the same figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.errors import DataError
from dist_lm.judge import Slicing, judge_file
from dist_lm.predict import Request, divide, predict_file
from dist_lm.predictors.base import PredictOptions
from tests.predictors.small_models import save_model, write_records


def test_two_processes_write_the_file_of_one(topics_data: Path, tmp_path: Path) -> None:
    folder = save_model("BertForTokenClassification", topics_data / "tokenizer", tmp_path / "model")
    records = [
        {"tokens": ["word"] * (1 + n % 7), "tags": ["B-PER"] + ["O"] * (n % 7), "n": n, "even": n % 2}
        for n in range(99)
    ]
    source = write_records(tmp_path / "in.jsonl", [*records, {"n": 99}])
    small = PredictOptions(batch_rows=4)
    one, two = (Request(str(folder), str(source), small, ranks=ranks, max_bad=1) for ranks in (1, 2))
    assert [(share.begin, share.end) for share in divide(two, 100)] == [(0, 64), (64, 100)]
    assert predict_file(one, tmp_path / "one.jsonl") == predict_file(two, tmp_path / "two.jsonl") == (100, 1)
    assert (tmp_path / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()
    slicing = Slicing(("even",), resamples=20, seed=1)
    assert judge_file(one, slicing) == judge_file(two, slicing)
    with pytest.raises(DataError, match=r"in\.jsonl:100: no field 'tokens'"):
        judge_file(Request(str(folder), str(source), small, ranks=2), slicing)
