"""The scripts of docs/examples run, and what is written outside of dist_lm is found by its name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.config import CustomTask
from dist_lm.data.manifest import Manifest
from dist_lm.data.sources.format import Format, ReadSettings
from dist_lm.data.sources.inputs import read_records
from dist_lm.data.sources.record import BadRecords
from dist_lm.data.sources.registry import format_named
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError
from dist_lm.metrics import read_metrics
from dist_lm.named_class import named_class
from dist_lm.run_dir import RunDir
from dist_lm.status import status_of
from dist_lm.tasks.base import Task
from dist_lm.tasks.registry import build_task
from tests.gloo_ranks import REPOSITORY, environment
from tests.token_rows import TEXTS, token_rows, token_view, train_kind

EXAMPLES = REPOSITORY / "docs" / "examples"
# As a user of the examples would write it; the ranks import this file, so only its last lines act.
PROGRAM = """
import os
import sys
from pathlib import Path

import dist_lm
import train_in_python
from dist_lm.errors import ConfigError
from dist_lm.local_training import RunCrashed

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    train_in_python.prepare_data(folder)
    recipe = folder / "recipe.yaml"
    recipe.write_text(train_in_python.RECIPE.format(folder=folder))
    try:
        dist_lm.run_training(recipe, ["run.seed=1"], cpu=1, max_restarts=0)
    except RunCrashed as error:
        print(error)
    # The server that ranks are forked from keeps what is only deleted here.
    os.environ["DIST_LM_FAULT"] = ""
    train_in_python.main(folder)
    try:
        dist_lm.run_training(recipe, ["run.seed=2"], cpu=1)
    except ConfigError as error:
        print(error)
    own = [
        "task.name=custom",
        "task.class=replaced_tokens:ReplacedTokens",
        "task.options.share=0.3",
        "run.eval_every=4",
        f"run.dir={folder}/own",
    ]
    print(dist_lm.run_training(recipe, own, cpu=1).state)
"""
RECORDS = """TY  - JOUR
TI  - One
AB  - The first abstract says something about language and about models.
AB  - It has a second line.
ER  -

TY  - BOOK
AB  - The second abstract is about other things, such as birds and trees.
ER  - 
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """What one Python program, which lives through a crash, leaves and prints."""
    folder = tmp_path_factory.mktemp("trained")
    program = folder / "program.py"
    program.write_text(PROGRAM)
    paths = os.pathsep.join([os.environ["PYTHONPATH"], str(EXAMPLES)])
    done = subprocess.run(
        [sys.executable, program, folder / "work"],
        env=environment({"PYTHONPATH": paths, "DIST_LM_FAULT": "kill@rank0:step6:after_step"}),
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "work", done


def test_training_runs_from_python_and_goes_on_after_a_crash(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, done = trained
    assert "error[crash] the run ended with exit code 1" in done.stdout
    assert "done at step 8: loss " in done.stdout
    attempts = status_of(RunDir(folder / "run")).attempts
    assert [attempt["reason"] for attempt in attempts[:2]] == ["died", "done"]
    assert attempts[1]["from_step"] == 4
    steps = [record["step"] for record in read_metrics(folder / "run" / "metrics.jsonl", "train")]
    assert steps == list(range(1, 9))


def test_python_hears_the_error_of_the_ranks(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = trained
    assert "error[config] the run ended with exit code 2" in done.stdout
    assert "run.seed: 1 -> 2" in done.stderr, "a rank says it"


def test_a_task_from_outside_is_trained_and_judged(trained: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = trained
    assert done.stdout.splitlines()[-1] == "done"
    heldout = read_metrics(folder / "own" / "metrics.jsonl", "eval")[-1]
    assert heldout["loss"] == heldout["replaced_loss"]
    assert heldout["replaced_loss"] < np.log(2), "less than two equally likely answers give"
    assert heldout["replaced_accuracy"] == pytest.approx(0.7, abs=0.05), "three of ten tokens are replaced"


def test_the_time_of_an_evaluation_is_told_by_the_record_that_it_falls_into(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, _ = trained
    records = read_metrics(folder / "own" / "metrics.jsonl", "train")
    (record,) = [record for record in records if "evaluation_seconds" in record]
    assert record["step"] == 5, "the evaluation stands behind step 4"
    assert 0 < record["evaluation_seconds"] < record["step_seconds"]


@pytest.fixture
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_kind(tmp_path_factory.mktemp("tokenizer"), "wordpiece")


@pytest.mark.fast
@pytest.mark.usefixtures("examples")
def test_the_features_of_the_task_depend_on_the_row_alone(tokenizer: Tokenizer) -> None:
    settings = CustomTask.model_validate(
        {"name": "custom", "class": "replaced_tokens:ReplacedTokens", "options": {"share": 0.2}}
    )
    task = build_task(settings, tokenizer, token_view(tokenizer, 64), 7)
    rows = token_rows(tokenizer, 64, count=16)
    together, alone = task.collate(rows), task.collate(rows.take(np.array([5])))
    assert (together.inputs["input_ids"][5] == alone.inputs["input_ids"][0]).all()
    assert (together.inputs["labels"][5] == alone.inputs["labels"][0]).all()
    assert together.inputs["labels"].float().mean().item() == pytest.approx(0.2, abs=0.05)
    rows.real[3:] = False
    assert task.collate(rows).targets == {"replaced": 3 * 64}


@pytest.mark.fast
@pytest.mark.usefixtures("examples")
def test_a_format_from_outside_reads_records_and_reports_bad_lines(tmp_path: Path) -> None:
    file = tmp_path / "refs.ris"
    file.write_text(RECORDS + "TY  - JOUR\nno tag\nAB  - cut")
    settings = ReadSettings(format="ris_source:Ris", fields={"text": "AB"})
    bad = BadRecords(limit=2)
    records = list(read_records([str(file)], settings, bad))
    assert [record.fields["text"].split()[1] for record in records] == ["first", "second"]
    assert records[0].fields["text"].endswith("\nIt has a second line.")
    assert [str(record.where) for record in records] == [f"{file}:1", f"{file}:7"]
    assert bad.examples == [f"{file}:11: no `TAG  - value`: 'no tag'", f"{file}:10: the record has no ER line"]


@pytest.mark.usefixtures("examples")
def test_a_format_from_outside_is_prepared(tmp_path: Path, tokenizer: Tokenizer) -> None:
    (tmp_path / "refs.ris").write_text("".join(f"AB  - {' '.join(text.split())}\nER  - \n" for text in TEXTS))
    words = ["data", "prepare", str(tmp_path / "refs.ris"), "--format", "ris_source:Ris", "--field", "text=AB"]
    words += ["--tokenizer", str(tokenizer.path), "--out", str(tmp_path / "data"), "--kind", "tokens", "--workers", "2"]
    words += ["--heldout", "0.2"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    counts = Manifest.load(str(tmp_path / "data" / "train")).preparation["counts"]
    assert counts["documents read"] == len(TEXTS)


@pytest.mark.fast
@pytest.mark.usefixtures("examples")
@pytest.mark.parametrize(
    ("reference", "base", "words"),
    [
        ("replaced_tokens", Task, "names no class"),
        ("no_such_module:Thing", Task, "cannot be imported"),
        ("replaced_tokens:Nothing", Task, "cannot be imported"),
        ("ris_source:Ris", Task, "is no Task"),
        ("dist_lm.tasks.base:Task", Task, "is no Task"),
        ("ris_source:re", Format, "is no Format"),
    ],
)
def test_a_class_that_is_not_there_or_of_another_sort_is_refused(reference: str, base: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        named_class(reference, base, where="task.class")
    assert refused.value.where == "task.class"
    assert refused.value.do


@pytest.mark.fast
def test_a_format_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="cannot be imported"):
        format_named("no_such_module:Thing")


def test_importing_dist_lm_imports_nothing_else() -> None:
    code = (
        "import sys, dist_lm; print({'torch', 'pydantic', 'deepspeed', 'ray'} & set(sys.modules), dist_lm.run_training)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout.startswith("set() <function run_training")
