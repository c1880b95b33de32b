"""docs/errors.md is made from the classes of errors, and each of them has a test that reproduces it."""

from __future__ import annotations

import ast
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.recorded_errors import FILE, NOT, Recorder, variables

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


def test_every_message_names_the_test_that_makes_it_or_says_why_none_does(script: dict[str, object]) -> None:
    known = json.loads(FILE.read_text())
    made = {(site.module, site.what) for site in script["sites"]()}  # type: ignore[operator]
    noted = {(module, what) for module, messages in known.items() for what in messages}
    advice = "`pytest --write-errors TEST` notes it, then `make errors`"
    assert noted == made, f"a message is new or gone: {noted ^ made}; {advice}"
    for module, messages in known.items():
        for what, test in messages.items():
            if test.startswith(NOT):
                assert len(test) > len(NOT) + 10, f"{module}: {what}; {advice}, or write why no test makes it"
                continue
            file, _, name = test.partition("::")
            functions = {n.name for n in ast.walk(ast.parse((REPOSITORY / file).read_text())) if hasattr(n, "name")}
            assert name.rpartition("::")[2] in functions, test


def test_what_a_test_makes_is_noted_in_its_process_and_in_those_it_starts(tmp_path: Path) -> None:
    made = (
        "from dist_lm.errors import ConfigError\n"
        "from dist_lm.accelerators import accelerator\n"
        "try: accelerator('abacus')\n"
        "except ConfigError: pass\n"
    )
    environment = {**os.environ, **variables(tmp_path), "PYTEST_CURRENT_TEST": "tests/x.py::test_y[1] (call)"}
    subprocess.run([sys.executable, "-c", made], cwd=REPOSITORY, env=environment, check=True)
    (note,) = tmp_path.iterdir()
    assert note.read_text().endswith("\ttests/x.py::test_y[1]\n")
    made_in = Recorder(tmp_path, write=False).made()
    assert made_in == {("dist_lm/accelerators.py", "there is no accelerator `{...}`"): ["tests/x.py::test_y"]}
