"""docs/errors.md is made from the classes of errors, and each of them has a test that reproduces it."""

from __future__ import annotations

import ast
import runpy
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> dict[str, object]:
    return runpy.run_path(str(REPOSITORY / "docs" / "make_errors.py"))


def test_the_page_is_current(script: dict[str, object]) -> None:
    made = script["page"]()  # type: ignore[operator]
    assert (REPOSITORY / "docs" / "errors.md").read_text() == made, "run `make errors`"


def test_every_kind_has_an_entry_and_no_entry_is_left_over(script: dict[str, object]) -> None:
    names = {error.__name__ for error in script["error_classes"]()}  # type: ignore[operator]
    assert names == set(script["KINDS"])  # type: ignore[call-overload]


def test_the_tests_that_reproduce_them_exist(script: dict[str, object]) -> None:
    for _, test in script["KINDS"].values():  # type: ignore[attr-defined]
        file, _, name = test.partition("::")
        tree = ast.parse((REPOSITORY / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert name in functions if name else any(function.startswith("test_") for function in functions), test
