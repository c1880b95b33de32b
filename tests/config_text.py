"""A small configuration, and what the loader says to a wrong one."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.config_files import load_config
from dist_lm.errors import MAX_MESSAGE_LINES, ConfigError

BASE = """\
# A small run.
task:
  name: mlm
  mask_probability: 0.2
model:
data: {train: shards/train, tokenizer: tokenizer}
batch:
  global: 64
  micro: 16
optim:
  lr: 1e-4
  schedule: {kind: cosine, warmup_steps: 10}
run:
  dir: runs/x
  steps: 1e2
"""


def refusal(path: str, *overrides: str) -> str:
    """What the loader says; every message keeps the limit and leads to exit code 2."""
    with pytest.raises(ConfigError) as caught:
        load_config(Path(path), overrides)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message.splitlines()) <= MAX_MESSAGE_LINES
    return message


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name
