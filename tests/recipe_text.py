"""A configuration that works, as a person would write it, and ways to write it to disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RECIPE = """\
task: {name: mlm, mask_probability: 0.2}
model:
  size: tiny
data:
  train: data/train
  tokenizer: tokenizer
batch: {global: 64, micro: 8}
optim:
  lr: 1e-4
  schedule: {kind: cosine, warmup_steps: 10}
run:
  dir: runs/one
  steps: 100
"""


def write_recipe(folder: Path, text: str = RECIPE, name: str = "recipe.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def write_deepspeed(folder: Path, values: dict[str, Any], name: str = "deepspeed.json") -> Path:
    """The JSON with one key a line: `{` is line 1, the first key line 2."""
    path = folder / name
    path.write_text(json.dumps(values, indent=2))
    return path


def line_of(path: Path, text: str) -> str:
    """`file:line` of the first line that holds `text`."""
    lines = path.read_text().splitlines()
    return f"{path}:{next(number for number, line in enumerate(lines, 1) if text in line)}"
