"""The command line: quick help, exit codes that mean something, and launchers' own flags."""

from __future__ import annotations

import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from dist_lm.cli import app
from tests.recipe_text import line_of, write_deepspeed, write_recipe

REPOSITORY = Path(__file__).parent.parent
RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))
HEAVY = {"torch", "transformers", "deepspeed", "ray", "webdataset"}
_IMPORTED = re.compile(r"^import time:[\d |]+\|\s*([\w.]+)$", re.MULTILINE)


def dist_lm(*arguments: object, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    """`dist-lm` with these arguments; stderr also tells every import."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "dist_lm", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )


def imported(done: subprocess.CompletedProcess[str]) -> set[str]:
    names = {name.split(".")[0] for name in _IMPORTED.findall(done.stderr)}
    assert {"typer", "dist_lm"} <= names, "the imports are not told"
    return names


def verbs() -> list[tuple[str, ...]]:
    """Every verb and every group of verbs, as words."""
    found: list[tuple[str, ...]] = []
    waiting: list[tuple[tuple[str, ...], object]] = [((), typer.main.get_command(app))]
    while waiting:
        words, command = waiting.pop()
        found.append(words)
        inner: dict[str, object] = getattr(command, "commands", {})
        waiting += [((*words, name), below) for name, below in inner.items()]
    return sorted(found)


def test_the_verbs_of_the_readme_exist() -> None:
    assert {("train",), ("config", "check"), ("data", "prepare"), ("tokenizer", "train"), ("export",)} <= set(verbs())


@pytest.mark.parametrize("words", verbs(), ids=lambda words: " ".join(words) or "dist-lm")
def test_help_works_and_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    done = dist_lm(*words, "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: dist-lm" in done.stdout or "Usage: python -m dist_lm" in done.stdout
    assert imported(done) & HEAVY == set()


def command_of(words: tuple[str, ...]) -> Any:
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    return command


_EXAMPLE = re.compile(r"^(?:[A-Z_]+=\S+ |watch -n \d+ )*dist-lm (.+)$", re.MULTILINE)


@pytest.mark.parametrize("words", verbs(), ids=lambda words: " ".join(words) or "dist-lm")
def test_the_help_of_every_verb_shows_three_examples_that_the_parser_takes(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Answers for `init`, which asks.
    monkeypatch.setattr("sys.stdin", io.StringIO("mlm\ndata\ntokenizer\nruns/x\n100\n"))
    examples = _EXAMPLE.findall(command_of(words).help)
    assert len(examples) == 3
    assert len(set(examples)) == 3 or words in {("ops",), ("ops", "build")}, "those of ops differ in variables"
    for example in examples:
        # Behind the first of these the shell begins another command, or a file.
        given = list(itertools.takewhile(lambda word: word not in {">", "|", "&&"}, shlex.split(example)))
        path: tuple[str, ...] = ()
        while given and (*path, given[0]) in verbs():
            path = (*path, given.pop(0))
        assert path[: len(words)] == words or words == ("recipes",), "one of `recipes` shows what takes a recipe"
        command = command_of(path)
        assert not hasattr(command, "commands"), "an example ends in a verb, not in a group"
        # Raises UsageError for an option, a type or a number of arguments that the verb does not take; starts nothing.
        command.make_context(" ".join(path), given)


def test_a_shell_completes_verbs() -> None:
    script = {**os.environ, "COMP_WORDS": "dist-lm che", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "from dist_lm.cli import app; app(prog_name='dist-lm')"],
        env={**script, "_DIST_LM_COMPLETE": "complete_bash"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["checkpoints"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_passes_config_check_without_torch_and_deepspeed(recipe: Path) -> None:
    done = dist_lm("config", "check", "-c", recipe.relative_to(REPOSITORY), "--ranks", 2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith(f"ok: launch/recipes/{recipe.name}, 2 ranks x ")
    assert imported(done) & HEAVY == set()


def test_config_show_tells_where_a_value_comes_from(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    deepspeed = write_deepspeed(tmp_path, {"gradient_clipping": 0.5})
    done = dist_lm("config", "show", "-c", path, f"deepspeed={deepspeed}")
    table = {line.split()[0]: line.split(maxsplit=2)[1:] for line in done.stdout.splitlines()}
    assert table["optim.lr"] == ["0.0001", line_of(path, "lr:")]
    assert table["optim.clip"] == ["0.5", f"{deepspeed}:2"]
    assert table["optim.eps"] == ["1e-08", "default"]


def errors_of(done: subprocess.CompletedProcess[str]) -> str:
    return "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))


def test_an_unknown_key_ends_with_code_2_and_its_line(tmp_path: Path) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("  lr:", "  learning_rate:"))
    done = dist_lm("config", "check", "-c", path)
    assert done.returncode == 2
    assert "Traceback" not in errors_of(done)
    assert "unknown key `optim.learning_rate`" in errors_of(done)
    assert line_of(path, "learning_rate") in errors_of(done)


@pytest.mark.parametrize("verb", [["config", "check"], ["config", "show"], ["train", "--cpu", "2"]], ids=" ".join)
def test_a_missing_file_ends_with_code_2_and_starts_nothing(tmp_path: Path, verb: list[str]) -> None:
    done = dist_lm(*verb, "-c", "nowhere.yaml", cwd=tmp_path)
    assert done.returncode == 2
    assert errors_of(done).startswith("error[config] there is no file nowhere.yaml")
    assert "Traceback" not in errors_of(done)
    assert list(tmp_path.iterdir()) == []


def test_fewer_rows_than_ranks_end_with_code_2(tmp_path: Path) -> None:
    done = dist_lm("config", "check", "-c", write_recipe(tmp_path), "--ranks", 65)
    assert done.returncode == 2
    assert "cannot feed 65 ranks" in errors_of(done)


@pytest.mark.parametrize("arguments", [["no-such-verb"], ["config", "check"], ["train", "--no-such-option"]])
def test_a_wrong_command_line_ends_with_code_2(arguments: list[str]) -> None:
    done = dist_lm(*arguments)
    assert done.returncode == 2
    assert "Usage:" in errors_of(done)


@pytest.mark.parametrize("flag", ["--local_rank=0", "--local-rank=3"])
def test_the_rank_that_deepspeed_puts_before_the_verb_is_accepted(tmp_path: Path, flag: str) -> None:
    path = write_recipe(tmp_path)
    done = dist_lm(flag, "config", "check", "-c", path)
    assert done.returncode == 0, errors_of(done)
    assert f"ok: {path}" in done.stdout
