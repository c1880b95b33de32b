"""A mixture through the whole loop: stages added on the way, another number of ranks, refusals."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.metrics import read_metrics
from tests.rank_scenarios import attempt_scenarios, losses, scenario, train_scenarios

FIRST = {"from_step": 3, "weights": {"left": 3}}
SECOND = {"from_step": 7, "weights": {"left": 0, "right": 1}}


def test_a_mixture_goes_on_with_a_new_stage_on_another_number_of_ranks(topics_data: Path, tmp_path: Path) -> None:
    pairs = topics_data / "pairs"
    common = {
        "data__train": [
            {"path": str(pairs / "train"), "weight": 0.5, "name": "left"},
            {"path": str(pairs / "train"), "weight": 0.5, "name": "right"},
        ],
        "data__heldout": {"one": str(pairs / "heldout"), "two": str(pairs / "heldout")},
        "optim__schedule": {"kind": "constant"},
    }
    calm = scenario(topics_data, tmp_path / "calm", **common, data__stages=[FIRST, SECOND], run__steps=8)
    begun = scenario(topics_data, tmp_path / "run", **common, data__stages=[FIRST], run__steps=5)
    longer = {**common, "run__steps": 8, "run__allow_change": ["data.stages", "run.steps"]}
    on = scenario(topics_data, tmp_path / "run", **longer, data__stages=[FIRST, SECOND])
    rewritten = scenario(topics_data, tmp_path / "run", **longer, data__stages=[{**FIRST, "weights": {"left": 9}}])
    train_scenarios(tmp_path / "two", [calm, begun], num_ranks=2)
    refused, done = attempt_scenarios(tmp_path / "three", [rewritten, on], num_ranks=3)
    assert refused["exit_code"] == 3
    assert "counts rows of another data set or order" in refused["message"]
    assert done["message"] == ""
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "calm"), rel=1e-5)

    records = read_metrics(tmp_path / "calm" / "metrics.jsonl", "train")
    epochs = {name: [record[f"epoch_{name}"] for record in records] for name in ("left", "right")}
    rows = [32 * record["step"] for record in records]
    # Both sources hold the same rows, so their epochs add up to the rows read.
    together = [left + right for left, right in zip(*epochs.values(), strict=True)]
    per_epoch = rows[-1] / together[-1]
    assert together == pytest.approx([read / per_epoch for read in rows])
    assert epochs["left"][-1] == epochs["left"][5], "weight 0 from step 7 on"
    assert epochs["right"][-1] - epochs["right"][5] == pytest.approx(2 * 32 / per_epoch)
    evaluation = read_metrics(tmp_path / "calm" / "metrics.jsonl", "eval")[-1]
    assert evaluation["one_loss"] == evaluation["two_loss"]
