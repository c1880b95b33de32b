"""Gauges follow metrics.jsonl: the newest value, whole lines only, also after an attempt cut it shorter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_lm.cluster.ray_metrics import SHOWN, read_newest

pytestmark = pytest.mark.fast
CLUSTER = Path(__file__).resolve().parent.parent.parent / "cluster"


def line(kind: str, step: int, loss: float) -> str:
    return json.dumps({"kind": kind, "step": step, "loss": loss}) + "\n"


def test_the_newest_whole_line_counts(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_newest(file, 0) == ({}, 0)
    text = line("train", 1, 5.0) + line("train", 2, 4.0) + line("eval", 2, 4.5)
    file.write_text(text + line("train", 3, 3.0)[:-5])
    values, position = read_newest(file, 0)
    assert values == {"dist_lm_loss": 4.0, "dist_lm_step": 2.0, "dist_lm_eval_loss": 4.5}
    assert position == len(text)
    file.write_text(text + line("train", 3, 3.0) + line("train", 4, float("nan")))
    values, position = read_newest(file, position)
    # A loss that is no number is not shown; the step is.
    assert values == {"dist_lm_loss": 3.0, "dist_lm_step": 4.0}
    file.write_text(line("train", 1, 5.0))
    assert read_newest(file, position)[0] == {"dist_lm_loss": 5.0, "dist_lm_step": 1.0}


def test_the_dashboard_asks_for_gauges_that_exist() -> None:
    dashboard = json.loads((CLUSTER / "grafana.json").read_text())
    exist = {f"ray_dist_lm_{name}" for name in (*SHOWN["train"], "step")} | {"ray_dist_lm_eval_loss"}
    asked = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            names = {word for word in target["expr"].replace("{", " ").replace("(", " ").split() if "dist_lm" in word}
            assert names <= exist, target["expr"]
            asked |= names
    assert asked == exist
