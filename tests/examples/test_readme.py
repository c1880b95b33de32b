"""The commands of the README, as they stand there, one after the other, from a csv to a model."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from tests.gloo_ranks import REPOSITORY, environment

pytestmark = pytest.mark.soak
# A person installs the program; here it is the one of the repository.
PROGRAM = f'set -e\ndist-lm() {{ {sys.executable} -m dist_lm "$@"; }}\n'


def commands(heading: str) -> str:
    """The code block below a heading, without the line that activates the environment, and with few steps."""
    text = (REPOSITORY / "README.md").read_text()
    found = re.search(rf"^## {heading}\n.*?^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    block = found[1].replace(". .venv/bin/activate\n", "")
    assert block.count("dist-lm") > 8
    return block.replace("--steps 200", "--steps 4").replace("--vocab-size 30522", "--vocab-size 2000")


def run(block: str, folder: Path) -> str:
    done = subprocess.run(
        ["bash", "-c", PROGRAM + block], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_from_a_csv_of_ones_own_to_a_model(tmp_path: Path) -> None:
    rows = [(text[:400], "short" if len(name) < 7 else "long") for name, text in sorted(topics.items())]
    for file, part in (("reviews.csv", rows[:60]), ("new.csv", rows[60:])):
        with (tmp_path / file).open("w", newline="") as opened:
            csv.writer(opened).writerows([("review", "kind"), *part])
    run(commands("Your own CSV"), tmp_path)
    assert len((tmp_path / "predicted.jsonl").read_text().splitlines()) == len(rows[60:])
    assert json.loads((tmp_path / "model" / "config.json").read_text())["id2label"] == {"0": "long", "1": "short"}
    assert "confusion" in (tmp_path / "report.html").read_text().lower()


def test_from_texts_of_ones_own_to_a_model(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    records = [{"text": text} for text in topics.values()]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "texts" / "a.jsonl").write_text("".join(lines))
    (tmp_path / "new.jsonl").write_text(json.dumps({"text": "The [MASK] statement raises an exception."}) + "\n")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": one["text"][:300]}) + "\n" for one in records[:3]))
    flags = "--task mlm --data data --tokenizer tokenizer --run-dir runs/mine --steps 4"
    told = run(f"dist-lm init my.yaml {flags}\n" + commands("Your own data"), tmp_path)
    assert "pseudo_perplexity" in told
    assert "prediction" in json.loads((tmp_path / "predicted.jsonl").read_text())
