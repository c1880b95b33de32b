"""Pages for users name keys, arguments and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import typer
import yaml

from dist_lm.cli import app
from dist_lm.config import RunConfig
from dist_lm.config_files import load_config
from dist_lm.config_keys import ALIASES, ELSEWHERE, flatten
from tests.recipe_text import write_recipe

pytestmark = pytest.mark.fast
REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
_ROW = re.compile(r"^\| `(\w+)` \| (?:`([\w.]+)`|-) \|", re.MULTILINE)
_LINK = re.compile(r"\]\(([^)#]+)")


def test_every_argument_of_the_trainer_leads_to_the_key_that_the_loader_suggests(tmp_path: Path) -> None:
    rows = _ROW.findall((REPOSITORY / "docs" / "migrating.md").read_text())
    assert len(rows) > 15
    config: RunConfig = load_config(write_recipe(tmp_path)).config
    keys = set(flatten(config))
    for argument, key in rows:
        if key:
            assert key in keys
            assert ALIASES.get(argument, argument) == key
        else:
            assert argument in ELSEWHERE


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tests_and_files_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        functions = {
            node.name
            for node in ast.walk(ast.parse((REPOSITORY / file).read_text()))
            if isinstance(node, ast.FunctionDef)
        }
        assert not name or name in functions, f"{file}::{name}"
    for link in _LINK.findall(text):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def test_workflows_run_make_targets_that_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    jobs = yaml.safe_load((REPOSITORY / ".github" / "workflows" / "check.yml").read_text())["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == ["make check", "make test"]
    assert {command.removeprefix("make ") for command in commands} <= targets


def test_every_page_stands_in_the_navigation_of_the_site() -> None:
    groups = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]
    entries = [value for group in groups for value in group.values()]
    named = [page for entry in entries for page in ([entry] if isinstance(entry, str) else map(_only_value, entry))]
    assert sorted(named) == [page.name for page in PAGES]


def _only_value(entry: dict[str, str]) -> str:
    (value,) = entry.values()
    return value


def test_the_make_targets_that_a_page_names_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    pages = [*PAGES, REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"]
    named = {name for page in pages for name in re.findall(r"(?:^|`)make (\w+)", page.read_text(), re.MULTILINE)}
    assert {"audit", "browser", "sbom", "test"} <= named <= targets


def test_the_verbs_and_options_that_a_page_names_exist() -> None:
    top = typer.main.get_command(app)
    checked = 0
    for page in PAGES:
        for words in re.findall(r"`dist-lm ([^`\n]+)`", page.read_text()):
            command, rest = top, words.split()
            while rest and rest[0] in getattr(command, "commands", {}):
                command = command.commands[rest.pop(0)]  # type: ignore[attr-defined]
            options = {option for parameter in command.params for option in parameter.opts}
            assert command is not top or rest[0].startswith("--"), words
            named = [word.split("=")[0] for word in rest if word.startswith("-")]
            assert set(named) <= options | {"--help"}, f"{page.name}: {words}"
            checked += 1
    assert checked > 20
