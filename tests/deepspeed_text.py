"""A small configuration with a DeepSpeed file, resolved as the trainer does it, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config_files import LoadedConfig
from dist_lm.deepspeed_config import ResolvedDeepSpeed, load_run, resolve
from dist_lm.deepspeed_keys import KeyPath
from dist_lm.errors import MAX_MESSAGE_LINES, ConfigError

YAML = """\
task: {name: mlm}
data: {train: shards/train, tokenizer: tokenizer}
batch:
  global: 64
  micro: 16
optim:
  lr: 1e-4
run:
  dir: runs/x
  steps: 100
deepspeed: ds.json
"""
HIDDEN_SIZE = 128
FULL_OF_AUTOS: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_allow_untested_optimizer": True,
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "hysteresis": 2},
    "bf16": {"enabled": "auto"},
    "data_types": {"grad_accum_dtype": "auto", "keep_in_fp32_modules": "auto"},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""The shape that people bring from other trainers."""


def load(settings: dict[str, Any] | str, *overrides: str) -> LoadedConfig:
    """x.yaml with this JSON in ds.json, one key a line: the first top-level key stands in line 2."""
    text = settings if isinstance(settings, str) else json.dumps(settings, indent=2)
    Path("ds.json").write_text(text)
    return load_run(Path("x.yaml"), overrides)


def resolved(settings: dict[str, Any] | str, *overrides: str, **how: Any) -> ResolvedDeepSpeed:
    """As the trainer does it, on two ranks with two micro-steps."""
    loaded = load(settings, *overrides)
    how = {"world_size": 2, "micro_rows": 16, "micro_steps": 2, "hidden_size": HIDDEN_SIZE, **how}
    return resolve(loaded.config, source_of=loaded.origins, **how)


def refusal(settings: dict[str, Any] | str, *overrides: str, **how: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        resolved(settings, *overrides, **how)
    assert caught.value.exit_code == 2
    message = str(caught.value)
    assert len(message.splitlines()) <= MAX_MESSAGE_LINES
    return message


def nested(path: KeyPath, value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return dict(value)


def at(settings: dict[str, Any], *path: str) -> Any:
    found: Any = settings
    for name in path:
        found = found[name]
    return found
