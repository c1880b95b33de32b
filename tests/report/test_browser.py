"""The pages that people open, in a real browser: no complaint, everything drawn, readable anywhere.

Needs Chromium and chromedriver: `make browser`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dist_lm.predictors import attribution_page
from dist_lm.report.page import page
from dist_lm.report.run_facts import read_run
from tests.report_run import write_run
from tests.web_browser import Browser, headless_browser

pytestmark = pytest.mark.browser
PHONE = 360
# Contrast of a colour with the canvas, as WCAG 2 defines it.
CONTRAST = """
const numbers = colour => {
  const context = document.createElement("canvas").getContext("2d");
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const light = colour => {
  const [r, g, b] = numbers(colour).map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  return .2126 * r + .7152 * g + .0722 * b;
};
const probe = document.createElement("p");
probe.style.background = "Canvas";
document.body.append(probe);
const canvas = light(getComputedStyle(probe).backgroundColor);
const contrast = colour => {
  const one = light(colour);
  return (Math.max(one, canvas) + .05) / (Math.min(one, canvas) + .05);
};
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with headless_browser() as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight runs: more than there are colours; their numbers sort otherwise than their texts."""
    folder = tmp_path_factory.mktemp("report")
    steps = [9, 1000, 10, 100, 8, 20, 3, 7]
    runs = [
        read_run(write_run(folder / f"run-{number}", lr=number * 1e-4, what="a rank was killed " * 20))
        for number in range(1, 9)
    ]
    runs = [replace(run, status=replace(run.status, step=step)) for run, step in zip(runs, steps, strict=True)]
    path = folder / "report.html"
    path.write_text(page(runs))
    return path


@pytest.fixture(scope="module")
def attributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    text = "a film that no one will forget " * 8
    parts = [
        {"field": "text", "start": 2, "end": 6, "attribution": 0.5},
        {"field": "text", "start": 12, "end": 14, "attribution": -0.4},
    ]
    one = {"target": "positive", "score": 0.9, "baseline_score": 0.5, "convergence_delta": 0.01, "attributions": parts}
    path = tmp_path_factory.mktemp("attributions") / "page.html"
    path.write_text(attribution_page.page([({"text": text}, {"explanations": [one]})], num_records=1))
    return path


def test_a_complaint_of_the_browser_is_seen(browser: Browser, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text("<!doctype html><script>nothing.here()</script>")
    browser.open(broken.as_uri())
    assert "nothing is not defined" in "\n".join(browser.complaints())


@pytest.mark.parametrize("width", [PHONE, 1200])
@pytest.mark.parametrize("name", ["report", "attributions"])
def test_a_page_has_no_error_and_fits_the_window(
    browser: Browser, request: pytest.FixtureRequest, name: str, width: int
) -> None:
    browser.open(request.getfixturevalue(name).as_uri(), width=width)
    assert browser.run("document.querySelectorAll('th button').forEach(b => b.click()); return innerWidth") == width
    assert browser.complaints() == []
    assert browser.run("return document.documentElement.scrollWidth") <= width


def test_every_curve_is_drawn_inside_its_plot(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri())
    plots = browser.run("""
        return [...document.querySelectorAll("figure svg")].map(svg => ({
          frame: svg.getBoundingClientRect().toJSON(),
          curves: [...svg.querySelectorAll("polyline, circle")].map(curve => ({
            ...curve.getBoundingClientRect().toJSON(), stroke: getComputedStyle(curve).stroke })) }))
    """)
    assert len(plots) >= 5
    for one in plots:
        frame = one["frame"]
        assert frame["width"] > 300
        assert len(one["curves"]) >= 8, "one a run"
        for curve in one["curves"]:
            assert frame["left"] <= curve["left"] <= curve["right"] <= frame["right"]
            assert frame["top"] <= curve["top"] <= curve["bottom"] <= frame["bottom"]
            assert curve["width"] > 5
            assert curve["stroke"].startswith("rgb")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_confusion_matrix_is_shaded_by_the_share_of_its_row_and_legible(
    browser: Browser, report: Path, dark: bool
) -> None:
    browser.open(report.as_uri(), dark=dark)
    cells = browser.run("""
        const cells = [...document.querySelector(".confusion").tBodies[0].querySelectorAll("td")];
        const context = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
        const over = (...colours) => {
          for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
          return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
        };
        const canvas = document.body.appendChild(document.createElement("p"));
        canvas.style.background = "Canvas";
        const below = getComputedStyle(canvas).backgroundColor;
        return cells.map(cell => [cell.textContent, over(below, getComputedStyle(cell).backgroundColor),
          over(getComputedStyle(cell).color), over(below)]);
    """)
    assert [text for text, *_ in cells] == ["7", "3", "0", "10"]
    for text, field, letters, canvas in cells:
        assert (field == canvas) == (text == "0")
        assert contrast(field, letters) > 4.5
    distances = [abs(light(field) - light(canvas)) for _, field, _, canvas in cells]
    assert distances[3] > distances[0] > distances[1] > distances[2] == 0


def light(colour: list[int]) -> float:
    """Relative luminance, WCAG 2."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (each / 255 for each in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[int], other: list[int]) -> float:
    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_the_shares_of_the_time_fill_their_bar(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri())
    widths = browser.run("""
        return [...document.querySelectorAll(".bar")].map(bar => [bar.clientWidth,
          [...bar.children].reduce((sum, part) => sum + part.getBoundingClientRect().width, 0)])
    """)
    assert len(widths) == 8
    for whole, parts in widths:
        assert parts == pytest.approx(whole, rel=0.01)


def test_a_click_sorts_numbers_as_numbers_and_another_turns_them(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri())
    click = """
        const table = document.querySelector("table");
        const head = [...table.tHead.rows[0].cells].find(cell => cell.textContent === "step");
        head.firstChild.click();
        return [head.ariaSort, [...table.tBodies[0].rows].map(row => row.cells[head.cellIndex].textContent)];
    """
    up = ["3", "7", "8", "9", "10", "20", "100", "1000"]
    assert browser.run(click) == ["ascending", up]
    assert browser.run(click) == ["descending", up[::-1]]
    names = browser.run("""
        const table = document.querySelector("table");
        table.querySelector("button").click();
        return [...table.tBodies[0].rows].map(row => row.cells[0].textContent);
    """)
    assert names == sorted(names)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_colour_stands_out_in_light_and_dark(browser: Browser, report: Path, dark: bool) -> None:
    browser.open(report.as_uri(), dark=dark)
    canvas, text, curves = browser.run(
        CONTRAST
        + """
        const strokes = [...document.querySelectorAll("polyline")].map(curve => getComputedStyle(curve).stroke);
        const names = [...document.querySelectorAll("b")].map(name => getComputedStyle(name).color);
        const all = [...new Set([...strokes, ...names])];
        return [canvas, contrast(getComputedStyle(document.body).color), all.map(contrast)];
        """
    )
    assert (canvas < 0.1) == dark, "the browser follows the preference"
    assert text > 10
    assert len(curves) == 7
    assert min(curves) >= 4.5, "also as the colour of a text"


def test_a_phone_shows_whole_words_and_legible_axes(browser: Browser, report: Path) -> None:
    browser.open(report.as_uri(), width=PHONE)
    broken = browser.run("""
        return [...document.querySelectorAll("th button")].filter(button => {
          const range = document.createRange();
          range.selectNodeContents(button);
          return range.getClientRects().length > button.textContent.split(/[ -]/).length;
        }).map(button => button.textContent);
    """)
    assert broken == []
    heights = browser.run(
        "return [...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height)"
    )
    assert min(heights) >= 9, "CSS pixels of a line, letters and the room above them"


def test_attributions_are_coloured_by_their_strength(browser: Browser, attributions: Path) -> None:
    browser.open(attributions.as_uri())
    colours = browser.run("""
        return [...document.querySelectorAll("section mark")].map(mark => getComputedStyle(mark).backgroundColor)
    """)
    assert colours == ["rgba(0, 150, 136, 0.8)", "rgba(230, 90, 20, 0.64)"]
