"""Pages for users name keys, arguments and tests that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

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
