"""Which test reproduces which error: noted while tests run, compared with what docs/errors.md says.

Enters: a session of pytest.  Leaves: a failed session where a test that passed did not make the error that
it is named for; with --write-errors, tests/reproduced_errors.json with the errors that were made.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recording import sitecustomize

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parent
FILE = HERE / "reproduced_errors.json"
"""Module -> message -> test, or what begins with NOT and says why there is none."""
NOT = "not reproduced: "


def variables(folder: Path) -> dict[str, str]:
    """Of a process that shall note what it makes, with the dist_lm of this repository."""
    paths = [str(HERE / "recording"), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    path = os.pathsep.join(path for path in paths if path)
    return {sitecustomize.FOLDER: str(folder), "PYTHONPATH": path}


def listen(folder: Path) -> None:
    """To this process, and to those that it will start."""
    os.environ.update(variables(folder))
    if "dist_lm.errors" in sys.modules:
        sitecustomize.watch(sys.modules["dist_lm.errors"])
    else:
        sys.meta_path.insert(0, sitecustomize._Finder())


class Recorder:
    """A plugin of pytest."""

    def __init__(self, folder: Path, *, write: bool) -> None:
        self._folder, self._write = folder, write
        self._passed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            self._passed.add(_without_parameters(report.nodeid))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        made = self.made()
        if self._write:
            write(made, self._passed)
            return
        missing = [
            f"{module}: {message}\n    {test}"
            for module, messages in json.loads(FILE.read_text()).items()
            for message, test in messages.items()
            if test in self._passed and (module, message) not in made
        ]
        if missing:
            print("\nThese passed and did not make the error that docs/errors.md names them for:", *missing, sep="\n")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def made(self) -> dict[tuple[str, str], list[str]]:
        """Module and message of each error -> the tests that it was made in."""
        places = {
            (site.module, line): (site.module, site.what)
            for site in runpy.run_path(str(REPOSITORY / "docs" / "make_errors.py"))["sites"]()
            for line in range(site.first_line, site.last_line + 1)
        }
        found: dict[tuple[str, str], list[str]] = {}
        for file, line, test in self._noted():
            key = places.get((file, line))
            if key is not None:
                found.setdefault(key, []).append(_without_parameters(test))
        return found

    def _noted(self) -> Iterator[tuple[str, int, str]]:
        for file in sorted(self._folder.iterdir()):
            for noted in file.read_text().splitlines():
                place, _, test = noted.partition("\t")
                path, _, line = place.rpartition(":")
                # Ray and a wheel run copies of the package.
                module = f"dist_lm/{path.rpartition('/dist_lm/')[2]}"
                yield module, int(line), test


def write(made: dict[tuple[str, str], list[str]], passed: set[str]) -> None:
    """Add tests for messages that have none, and drop what dist_lm no longer says."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    content: dict[str, dict[str, str]] = {}
    for site in runpy.run_path(str(REPOSITORY / "docs" / "make_errors.py"))["sites"]():
        test = known.get(site.module, {}).get(site.what, NOT)
        tests = [test for test in made.get((site.module, site.what), []) if test in passed]
        if test.startswith(NOT) and tests:
            test = tests[0]
        content.setdefault(site.module, {})[site.what] = test
    FILE.write_text(json.dumps(content, indent=1) + "\n")


def _without_parameters(test: str) -> str:
    return test.partition("[")[0]
