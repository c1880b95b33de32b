"""Recipes by name, in the wheel, copied, and of one's own."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.config_files import load_config
from dist_lm.deepspeed_config import load_run
from dist_lm.errors import ConfigError
from dist_lm.recipes.new import TASKS, Answers, new_recipe
from dist_lm.recipes.shipped import copy_files, recipe_names

pytestmark = pytest.mark.fast
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_by_name_is_the_recipe_of_the_repository(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    known = load_run(Path("launch/recipes") / f"{name}.yaml").config
    monkeypatch.chdir(tmp_path)
    named = load_run(Path(f"recipe:{name}")).config
    assert named.deepspeed is not None
    assert named.deepspeed.is_file(), "without the repository"
    assert named.model_copy(update={"deepspeed": known.deepspeed}) == known


def test_a_recipe_that_is_not_there_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Path("recipe:bert-mini-doc"))
    assert caught.value.do == "did you mean recipe:bert-mini-docs?"


def test_the_list_has_every_recipe_with_what_it_is_for() -> None:
    lines = CliRunner().invoke(app, ["recipes"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        f"recipe:{path.stem}" for path in sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))
    ]
    assert all(len(line.split()) > 4 for line in lines)


def test_copied_files_work_where_they_are_and_nothing_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = copy_files(tmp_path)
    assert tmp_path / "cluster" / "kuberay" / "base" / "rayjob.yaml" in copied
    monkeypatch.chdir(tmp_path)
    assert load_run(Path("launch/recipes/ner.yaml")).config.deepspeed == Path("ds_configs/cpu_gloo.json")
    (tmp_path / "cluster" / "aws.yaml").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        copy_files(tmp_path)
    assert (tmp_path / "cluster" / "aws.yaml").read_text() == "mine"


def test_the_wheel_holds_every_shipped_file(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("dist_lm", "launch", "ds_configs", "cluster"):
        leave_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / name, source / name, symlinks=True, ignore=leave_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    program = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        held = set(wheel.namelist())
        text = wheel.read("dist_lm/recipes/files/recipes/ner.yaml")
    assert text == (REPOSITORY / "launch" / "recipes" / "ner.yaml").read_bytes()
    for folder, there in {"launch/recipes": "recipes", "ds_configs": "ds_configs", "cluster": "cluster"}.items():
        files = [
            path for path in (REPOSITORY / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts
        ]
        assert len(files) > 5
        wanted = {f"dist_lm/recipes/files/{there}/{path.relative_to(REPOSITORY / folder)}" for path in files}
        assert wanted <= held, wanted - held


@pytest.mark.parametrize("task", TASKS)
def test_five_answers_make_a_recipe_that_holds_together(task: str, tmp_path: Path) -> None:
    out = tmp_path / "my.yaml"
    flags = ["--task", task, "--data", "my: data", "--tokenizer", "tok", "--run-dir", "runs/x", "--steps", "7"]
    done = CliRunner().invoke(app, ["init", str(out), *flags])
    assert done.exit_code == 0, done.output
    checked = CliRunner().invoke(app, ["config", "check", "-c", str(out), "--ranks", "2"])
    assert checked.exit_code == 0, checked.output
    config = load_run(out).config
    assert (config.task.name, config.run.steps, config.data.train) == (task, 7, "my: data/train")


def test_what_no_flag_says_is_asked(tmp_path: Path) -> None:
    out = tmp_path / "new" / "my.yaml"
    done = CliRunner().invoke(
        app, ["init", str(out), "--from", "bert"], input="classification\ndata\nbert\nruns/y\n500\n"
    )
    assert done.exit_code == 0, done.output
    config = load_run(out).config
    assert (str(config.model.weights), config.run.eval_every) == ("bert", 50)


def test_wrong_answers_and_files_that_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no task"):
        new_recipe(Answers("poetry", "d", "t", "r", 1))
    with pytest.raises(ConfigError, match="no run"):
        new_recipe(Answers("mlm", "d", "t", "r", 0))
    (tmp_path / "my.yaml").write_text("mine")
    flags = ["--task", "mlm", "--data", "d", "--tokenizer", "t", "--run-dir", "r", "--steps", "7"]
    refused = CliRunner().invoke(app, ["init", str(tmp_path / "my.yaml"), *flags])
    assert isinstance(refused.exception, ConfigError)
    assert (tmp_path / "my.yaml").read_text() == "mine"
