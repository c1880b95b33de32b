"""Preparation and prediction by tasks of a Ray cluster on this machine, whose head has no dashboard."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import ray

from dist_lm.data.preparation import runners
from dist_lm.data.preparation.map_task import map_split
from dist_lm.data.prepare import prepare
from dist_lm.data.tokenizer import Tokenizer, train_tokenizer
from dist_lm.errors import DataError, EnvironmentFault
from dist_lm.predict import Request, predict_file
from dist_lm.predictors.base import PredictOptions
from tests.data.preparation.preparing import TEXTS, files_of, options, write_lines
from tests.gloo_ranks import REPOSITORY, run_command, write_recipe
from tests.predictors.small_models import save_model, write_records

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]
RECORDS = [{"text": text} for text in [*TEXTS, *TEXTS[:30]]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=800, out=tmp_path_factory.mktemp("on_ray") / "tokenizer")


def test_ray_makes_the_same_bytes_as_this_process(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_lines(tmp_path / "texts.jsonl", RECORDS)
    # The workers of Ray are in another folder.
    monkeypatch.chdir(tmp_path)
    made = options(Path("texts.jsonl"), tokenizer, tmp_path / "local", split_bytes=120_000, bucket_bytes=250_000)
    prepare(made)
    prepare(dataclasses.replace(made, out=tmp_path / "ray", ray=True))
    assert files_of(tmp_path / "ray") == files_of(made.out)


def test_ray_predicts_what_this_process_predicts(
    topics_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("BertForTokenClassification", topics_data / "tokenizer", tmp_path / "model")
    words = [{"tokens": ["word"] * (1 + n % 7), "n": n} for n in range(200)]
    write_records(tmp_path / "in.jsonl", [*words, {"n": 200}])
    # The workers of Ray are in another folder.
    monkeypatch.chdir(tmp_path)
    here = Request("model", "in.jsonl", PredictOptions(batch_rows=4), max_bad=1)
    assert predict_file(here, Path("here.jsonl")) == (201, 1)
    assert predict_file(dataclasses.replace(here, ray=True), Path("ray.jsonl")) == (201, 1)
    assert Path("ray.jsonl").read_bytes() == Path("here.jsonl").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.jsonl", "in.jsonl", "model", "ray.jsonl"]
    # One that is too many is told as without Ray, and nothing is left.
    with pytest.raises(DataError, match="1 bad record, and 0 are allowed"):
        predict_file(dataclasses.replace(here, ray=True, max_bad=0), Path("none.jsonl"))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_run_is_refused_by_a_head_without_the_dashboard(topics_data: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", topics_data)
    address = ray.get_runtime_context().gcs_address
    done = run_command(
        [sys.executable, REPOSITORY / "launch" / "on_ray.py", "-c", recipe], env={"RAY_ADDRESS": address}
    )
    assert done.returncode == EnvironmentFault.exit_code
    assert "runs without its dashboard" in done.stderr
    assert not (tmp_path / "run").exists()


def test_an_error_of_a_ray_task_is_the_error_of_the_command(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "texts.jsonl", [*RECORDS, {"body": "x"}])
    made = options(source, tokenizer, tmp_path / "data", ray=True)
    with pytest.raises(DataError, match="1 bad record") as error:
        prepare(made)
    assert error.value.where == f"{source}:{len(RECORDS) + 1}"
    # Workers of Ray serve many runs: what they remember of the first must not count for the second.
    assert prepare(dataclasses.replace(made, max_bad=1)).counts["bad records"] == 1


def test_a_task_that_does_not_see_the_folder_says_so(tmp_path: Path) -> None:
    job = tmp_path / "on_another_node" / "job-0.json"
    tasks = runners.run_tasks(lambda number: map_split(job, number), [0], workers=1, ray=True, doing="tokenising")
    with pytest.raises(EnvironmentFault, match="cannot see the folder") as error:
        list(tasks)
    assert "storage that every node reaches" in error.value.do


def test_a_task_whose_process_dies_each_time_is_told() -> None:
    with pytest.raises(EnvironmentFault, match="a Ray task was lost while dying"):
        list(runners.run_tasks(os._exit, [1], workers=1, ray=True, doing="dying"))
