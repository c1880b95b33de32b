"""The report: one page that needs nothing else, with every curve inside its frame and no text read as HTML."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.errors import ConfigError, DataError
from dist_lm.report.curves import HEIGHT, MOST_POINTS, WIDTH, Curve, plot
from dist_lm.report.page import page
from dist_lm.report.planned import PlannedMemory
from dist_lm.report.run_facts import RunFacts, read_run
from tests.report_run import write_run

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
    assert run.marks == [
        (60.0, "attempt 1: crash at step 60"),
        (70.0, "block replaced at step 70: shard train-3.tar"),
        (90.0, "rolled back from step 90 to 80"),
    ]
    assert [step for step, _ in run.points("train", "loss")] == [10, 20, 30, 50, 60, 70, 80, 90, 100]
    assert "attempt 1: crash at step 60" in page([run])
    assert run.status.lost_steps == 10


def test_the_shares_of_a_step_add_up_to_one(run: RunFacts) -> None:
    shares = run.where_time_went()
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["waiting for data"] == pytest.approx(0.1)
    assert shares["evaluation"] == pytest.approx(0.02), "0.02 of 10 x 0.1 seconds"
    assert shares["other"] == pytest.approx(0.08)


def test_the_loss_of_the_only_objective_is_drawn_once(run: RunFacts) -> None:
    assert {"loss", "lm_loss"} <= set(run.names("train"))
    text = page([run])
    assert "<figcaption>loss</figcaption>" in text
    assert "<figcaption>lm_loss</figcaption>" not in text
    both = [{**record, "nsp_loss": 1.0} for record in run.train]
    text = page([replace(run, train=both)])
    assert all(f"<figcaption>{name}</figcaption>" in text for name in ("loss", "lm_loss", "nsp_loss"))


def rows_of(text: str, *, under: str) -> list[list[str]]:
    """Cells of the first table after a heading."""
    part = text[text.index(under) :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    return [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in body.split("</tr>")[:-1]]


def test_the_last_evaluation_shows_its_classes_and_who_is_taken_for_whom(run: RunFacts) -> None:
    text = page([run])
    assert rows_of(text, under=", step 100</h3>") == [
        ["good", "0.8", "0.7", "0.75", "10"],
        ["bad", "0.8", "0.7", "0.75", "10"],
    ]
    assert rows_of(text, under='class="confusion"') == [["good", "7", "3"], ["bad", "0", "10"]]
    assert 'style="--share:30.0%">3<' in text, "of its row"
    assert "MFU" in text


def test_an_evaluation_of_a_file_is_shown_with_its_intervals(tmp_path: Path) -> None:
    write_run(tmp_path / "one")
    judged = {
        **{"model": "runs/<b>", "input": "test.jsonl", "records": 100, "bad_records": 1, "signature": "BLEU nrefs:1"},
        **{"figures": {"bleu": 31.25, "chrf": 55.5}, "intervals": {"bleu": [29.5, 33.0]}, "classes": {}},
        "slices": {"source": {"news": {"records": 40, "figures": {"bleu": 30.0}, "intervals": {}}}},
    }
    file, out = tmp_path / "figures.json", tmp_path / "page.html"
    file.write_text(json.dumps(judged))
    words = ["report", str(tmp_path / "one"), "--out", str(out), "--evaluation", str(file), "--no-plan"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    text = out.read_text()
    assert rows_of(text, under="runs/&lt;b&gt; on test.jsonl") == [
        ["bleu", "31.25", "29.5", "33"],
        ["chrf", "55.5", "", ""],
    ]
    assert ["source = news", "40", "30", ""] in rows_of(text, under=">slice<")
    assert "BLEU nrefs:1" in text
    file.write_text('{"figures": 3}')
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, DataError)


def test_a_key_tells_where_its_value_comes_from(run: RunFacts) -> None:
    rows = {row[0]: row[1:] for row in rows_of(page([run]), under="<details><summary>All")}
    assert rows["optim.lr"] == ["0.0001", "command line: optim.lr=0.0001"]
    assert rows["run.steps"] == ["100", "my.yaml:9"]
    assert rows["run.keep"] == ["3", "default"]
    shipped = replace(
        run, origins={"optim.lr": "/x/site-packages/dist_lm/recipes/files/recipes/bert-mini-docs.yaml:12"}
    )
    assert shipped.origin("optim.lr") == "recipe bert-mini-docs, line 12"


def test_memory_that_was_planned_stands_beside_what_was_measured(run: RunFacts) -> None:
    planned = replace(run, planned=PlannedMemory(0.25, 0.5, 0.75, 1.5))
    (row,) = rows_of(page([planned]), under="Memory of a rank")
    assert row[1:] == ["0.25", "0.5", "0.75", "1.5", "1.5"]
    text = page([replace(run, planned=PlannedMemory(0, 0, 0, 0, "the data <are> gone"))])
    assert "no plan: the data &lt;are&gt; gone" in text
    assert rows_of(text, under="Memory of a rank")[0][1:] == ["", "", "", "", "1.5"]


def test_runs_are_compared_by_what_differs(tmp_path: Path, run: RunFacts) -> None:
    other = read_run(write_run(tmp_path / "two", lr=1e-3))
    text = page([run, other])
    different = text[text.index("<h3>Different") : text.index("<details><summary>All")]
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
