"""The report: one page that needs nothing else, with every curve inside its frame and no text read as HTML."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.errors import ConfigError
from dist_lm.report.curves import HEIGHT, MOST_POINTS, WIDTH, Curve, plot
from dist_lm.report.page import page
from dist_lm.report.run_facts import RunFacts, read_run
from dist_lm.run_dir import RunDir
from tests.recipe_text import RECIPE

pytestmark = pytest.mark.fast
_VOID = {"meta", "line"}
HOSTILE = '<script>alert(1)</script> & "quoted" \'</svg>'


class Elements(HTMLParser):
    """Every element, once it is certain that they nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in _VOID or (tag == "line" and not self.get_starttag_text().endswith("/>")):  # type: ignore[union-attr]
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def write_run(folder: Path, *, lr: float = 1e-4, what: str = "a rank was killed") -> RunDir:
    """The files of a run that was killed at step 60 and went on from step 50."""
    run_dir = RunDir(folder)
    run_dir.begin()
    run_dir.identity.write_text(json.dumps({"run.steps": 100}))
    values = yaml.safe_load(RECIPE)
    values["optim"]["lr"] = lr
    run_dir.config.write_text(yaml.safe_dump(values))
    first = run_dir.open_attempt({"from_step": 0, "world_size": 2, "launcher": "local"})
    run_dir.close_attempt(first, reason="crash", step=60, useful_s=6.0, what=what)
    second = run_dir.open_attempt({"from_step": 50, "world_size": 2, "launcher": "local"})
    run_dir.close_attempt(second, reason="done", step=100, useful_s=5.0)
    records = [
        {
            **{"kind": "train", "step": step, "time": 0.0, "loss": 8.0 - step / 20, "grad_norm": 1.0},
            **{"learning_rate": lr, "tokens_per_second": 1e4, "epoch_wiki": step / 50, "step_seconds": 0.1},
            **{"data_seconds": 0.01, "forward_seconds": 0.03, "backward_seconds": 0.05},
        }
        for step in range(10, 101, 10)
    ]
    records[3]["loss"] = float("nan")
    records.append({"kind": "eval", "step": 100, "time": 0.0, "loss": 3.5, "f1": 0.75})
    records.append({"kind": "event", "step": 100, "time": 0.0, "event": "saved"})
    run_dir.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    return run_dir


@pytest.fixture
def run(tmp_path: Path) -> RunFacts:
    return read_run(write_run(tmp_path / "one"))


def test_the_verb_writes_a_page_that_asks_for_nothing_else(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", lr=1e-3)
    out = tmp_path / "page.html"
    done = CliRunner().invoke(app, ["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(out)])
    assert done.exit_code == 0, done.output
    text = out.read_text()
    elements = Elements(text)
    assert not re.search(r"url\(|@import|fetch|://", text)
    assert not [attributes for _, attributes in elements.found if {"src", "href"} & set(attributes)]
    assert elements.all("link") == []
    assert {"name": "viewport", "content": "width=device-width"} in elements.all("meta")
    assert "color-scheme: light dark" in text
    assert all(len(figure["points"].split()) > 1 for figure in elements.all("polyline"))  # type: ignore[union-attr]
    assert len(elements.all("svg")) == len(elements.all("figure")) >= 5


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["report", str(tmp_path), "--out", str(tmp_path / "page.html")])
    assert isinstance(done.exception, ConfigError)
    assert not (tmp_path / "page.html").exists()


def test_nothing_that_a_run_wrote_is_read_as_html(tmp_path: Path) -> None:
    hostile = read_run(write_run(tmp_path / "<b>run", what=HOSTILE))
    elements = Elements(page([hostile]))
    assert len(elements.all("script")) == 1, "the page's own"
    assert elements.all("b") != []
    assert "<b>run" in elements.text
    assert HOSTILE in elements.text


def test_a_crash_is_marked_at_its_step_and_a_figure_that_is_not_finite_is_left_out(run: RunFacts) -> None:
    assert run.marks == [(60.0, "attempt 1: crash at step 60")]
    assert [step for step, _ in run.points("train", "loss")] == [10, 20, 30, 50, 60, 70, 80, 90, 100]
    assert "attempt 1: crash at step 60" in page([run])
    assert run.status.lost_steps == 10


def test_the_shares_of_a_step_add_up_to_one(run: RunFacts) -> None:
    shares = run.where_time_went()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["waiting for data"] == pytest.approx(0.1)
    assert shares["other"] == pytest.approx(0.1)


def test_runs_are_compared_by_what_differs(tmp_path: Path, run: RunFacts) -> None:
    other = read_run(write_run(tmp_path / "two", lr=1e-3))
    text = page([run, other])
    different = text[text.index("<h3>Different") : text.index("<details>")]
    keys = re.findall(r"<tr><td>([\w.]+)</td>", different)
    assert keys == ["optim.lr"]
    assert "Different" not in page([run])


def test_every_point_lies_in_the_frame_and_higher_values_stand_higher() -> None:
    points = [(1.0, -3.0), (2.0, 1e6), (3.0, 5.0)]
    elements = Elements(plot("values", [Curve("a", points, 0)], [(2.0, "here", 0), (99.0, "outside", 0)]))
    (line,) = elements.all("polyline")
    places = [tuple(map(float, pair.split(","))) for pair in str(line["points"]).split()]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in places)
    assert places[1][1] < places[2][1] <= places[0][1]
    assert [x for x, _ in places] == sorted(x for x, _ in places)
    (mark,) = [line for line in elements.all("line") if "mark" in str(line["class"])]
    assert float(str(mark["x1"])) == places[1][0]


def test_a_long_run_keeps_its_spike() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[77_777] = (77_777.0, 50.0)
    (line,) = Elements(plot("loss", [Curve("a", points, 0)])).all("polyline")
    places = str(line["points"]).split()
    assert len(places) <= MOST_POINTS
    assert min(float(place.partition(",")[2]) for place in places) == pytest.approx(10.0)


@pytest.mark.parametrize("value", [0.0, -7.5, 1e-12, 1e30])
def test_a_constant_and_a_single_point_are_drawn(value: float) -> None:
    assert len(Elements(plot("x", [Curve("a", [(5.0, value)], 0)])).all("circle")) == 1
    assert len(Elements(plot("x", [Curve("a", [(0.0, value), (5.0, value)], 0)])).all("polyline")) == 1
    assert plot("x", [Curve("a", [], 0)]) == ""
