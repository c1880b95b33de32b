"""docs/images/*.png from real runs: the console of a run on a terminal, TensorBoard, and a report.

Enters: the folder that `dist-lm demo` made.  Leaves: three PNG files.  Needs Chromium and chromedriver.
`python docs/make_pictures.py demo` (or `make demo pictures`) takes about two minutes.
"""

from __future__ import annotations

import contextlib
import html
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pyte

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGES = Path(__file__).resolve().parent / "images"
sys.path.insert(0, str(REPOSITORY))

from dist_lm.cluster.local import free_port  # noqa: E402
from tests.terminal import run_on_terminal  # noqa: E402
from tests.web_browser import Browser, headless_browser  # noqa: E402

_STEPS = 150
_SHOWN = rf"step 1[12]\d of {_STEPS} "
_CARDS = "train/(loss|mlm_loss|mlm_accuracy|nsp_accuracy)"
_PAGE = (
    "<style>body {{ background: #14171f; color: #e6e6e6; margin: 14px }} pre {{ font: 14px/19px monospace }}</style>"
    "<pre>{}</pre>"
)
_COLOURS = {"default": "inherit", "brown": "#c8a000", "black": "#333", "red": "#e0305a", "green": "#40b060"}


def console(demo: Path, browser: Browser, folder: Path) -> None:
    """A run of the demo's recipe, while it is under way."""
    run = folder / "runs" / "mine"
    data = [f"data.{name}={demo / 'pairs' / name}" for name in ("train", "heldout")]
    words = [
        *(sys.executable, "-m", "dist_lm", "train", "-c", "recipe:demo-pretrain", "--cpu", "2"),
        *(*data, f"data.tokenizer={demo / 'tokenizer'}", f"run.dir={run}", f"run.steps={_STEPS}"),
        *("run.log_every=5", "run.eval_every=50", "run.save_every=50", "run.peak_tflops=0.06"),
    ]
    shown = run_on_terminal(words, draw=_as_html)
    assert shown.exit_code == 0, shown.text
    page = folder / "console.html"
    there = [frame for frame in shown.frames if re.search(_SHOWN, re.sub("<[^>]*>", "", frame))]
    text = re.sub(f"{re.escape(str(folder))}/", "", there[-1])
    page.write_text(_PAGE.format(text.strip("\n")), encoding="utf-8")
    browser.open(page.as_uri(), width=1210, height=430)
    (IMAGES / "console.png").write_bytes(browser.picture())


def _as_html(screen: pyte.Screen) -> str:
    lines = []
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        lines.append("".join(map(_cell, cells)).rstrip())
    return "\n".join(lines)


def _cell(cell: pyte.screens.Char) -> str:
    text = html.escape(cell.data)
    colour = _COLOURS.get(cell.fg, f"#{cell.fg}")
    if colour == "inherit" and not cell.bold:
        return text
    return f'<span style="color: {colour}; font-weight: {"bold" if cell.bold else "normal"}">{text}</span>'


@contextlib.contextmanager
def _tensorboard(run: Path) -> Iterator[str]:
    """Address of a TensorBoard that shows the run."""
    port = free_port()
    words = [sys.executable, "-m", "dist_lm", "tb", str(run), "--port", str(port)]
    server = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        next(line for line in server.stderr if "Press CTRL+C" in line)
        yield f"http://localhost:{port}"
    finally:
        server.terminate()
        server.wait(60)


def tensorboard(demo: Path, browser: Browser) -> None:
    """The pretraining, which was killed on its way."""
    with _tensorboard(demo / "runs" / "pretrain") as address:
        browser.open(f"{address}/?tagFilter={_CARDS}#timeseries", width=1400, height=717)
        deadline = time.monotonic() + 120
        while browser.run("return document.querySelectorAll('scalar-card line-chart canvas').length") < 2:
            assert time.monotonic() < deadline, "TensorBoard draws nothing"
            time.sleep(0.5)
        # The curves come after their axes, and nothing in the page tells it.
        time.sleep(10)
        (IMAGES / "tensorboard.png").write_bytes(browser.picture())


def report(demo: Path, browser: Browser, folder: Path) -> None:
    """The two fine-tunings side by side: from the pretrained model, and from random weights."""
    runs = [f"runs/finetune-{name}" for name in ("pretrained", "from-scratch")]
    page = folder / "report.html"
    subprocess.run([sys.executable, "-m", "dist_lm", "report", *runs, "--out", page], cwd=demo, check=True)
    browser.open(page.as_uri(), width=1000, height=1000)
    (IMAGES / "report.png").write_bytes(browser.picture())


if __name__ == "__main__":
    made = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as temporary, headless_browser() as window:
        report(made, window, Path(temporary))
        tensorboard(made, window)
        console(made, window, Path(temporary))
