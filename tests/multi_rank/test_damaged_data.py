"""A block of the training data is damaged: the run goes on without it, alike on any number of ranks."""

from __future__ import annotations

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm.config import SourceSpec
from dist_lm.data.stream import Stream
from dist_lm.data.training_set import TrainingSet
from dist_lm.metrics import read_metrics
from tests.data.text_datasets import flip_bit
from tests.rank_scenarios import attempt_scenarios, losses, scenario, train_scenarios

FIRST_STEP = 3
"""The first step with rows of the damaged block."""
COMMON: dict[str, Any] = {"data__era": 8, "data__heldout": None, "optim__schedule": {"kind": "constant"}}


def block_of_step(train: Path) -> tuple[int, int, int]:
    """Shard and block that FIRST_STEP reads and no step before, and where the block begins in the file."""
    data = TrainingSet([SourceSpec(path=str(train))], seed=3, lanes=4, era=8)
    manifest = data.view.manifest
    with Stream(data, global_rows=32, rank=0, world_size=1) as stream:
        ids = [step.rows.sample_id.astype(np.int64) for step in islice(stream, FIRST_STEP)]
    starts = np.concatenate([[0], np.cumsum(manifest.shard_rows)])
    shards = [np.searchsorted(starts, step, side="right") - 1 for step in ids]
    places = [
        set(zip(of.tolist(), ((step - starts[of]) // manifest.block_rows).tolist(), strict=True))
        for step, of in zip(ids, shards, strict=True)
    ]
    shard, block = min(places[-1].difference(*places[:-1]))
    offsets = np.fromfile(train / manifest.shards[shard].index_name, dtype="<u8")
    return shard, block, int(offsets[block])


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(run_dir / "metrics.jsonl", "event") if event["event"] == name]


def test_a_damaged_block_is_replaced_alike_on_any_number_of_ranks_and_after_a_resume(
    topics_data: Path, tmp_path: Path
) -> None:
    whole = topics_data / "pairs" / "train"
    hurt = tmp_path / "hurt"
    shutil.copytree(whole, hurt)
    shard, block, offset = block_of_step(whole)
    flip_bit(hurt / f"s-{shard:06d}.tar", offset + 520)
    substitute = {**COMMON, "data__train": str(hurt), "data__on_damage": "substitute"}

    def run(name: str, **changes: Any) -> dict[str, Any]:
        return scenario(topics_data, tmp_path / name, **{**substitute, **changes})

    begun = run("resumed", run__steps=4)
    # The damage is repaired meanwhile, and would be an error if it were met: the checkpoint tells of it.
    on = run("resumed", data__train=str(whole), data__on_damage="fail", run__allow_change=["run.steps"])
    calm = run("calm", data__train=str(whole))
    train_scenarios(tmp_path / "on-two", [calm, run("two"), begun, on], num_ranks=2)
    none_left = run("none_left", data__max_quarantine=1, data__train=str(twice_hurt(hurt, whole, tmp_path / "twice")))
    failing, limited, done = attempt_scenarios(
        tmp_path / "on-three", [run("failing", data__on_damage="fail"), none_left, run("three")], num_ranks=3
    )
    assert done["message"] == ""
    train_scenarios(tmp_path / "on-one", [run("one")], num_ranks=1)

    two = losses(tmp_path / "two")
    assert len(two) == 6
    for name in ("one", "three"):
        assert losses(tmp_path / name) == pytest.approx(two, rel=1e-5)
    assert losses(tmp_path / "resumed") == two
    undamaged = losses(tmp_path / "calm")
    before = range(1, FIRST_STEP)
    assert [two[step] for step in before] == [undamaged[step] for step in before]
    assert two[FIRST_STEP] != undamaged[FIRST_STEP]

    for name in ("one", "two", "three", "resumed"):
        (event,) = events(tmp_path / name, "damage")
        assert (event["source"], event["shard"], event["block"]) == (0, shard, block)
        assert f"s-{shard:06d}.tar, block {block}" in event["where"]
    manifest = json.loads((tmp_path / "resumed" / "checkpoints" / "step-00000006" / "manifest.json").read_text())
    assert manifest["progress"]["quarantine"] == [[0, shard, block]]

    assert failing["exit_code"] == limited["exit_code"] == 3
    assert f"s-{shard:06d}.tar, block {block})" in failing["message"]
    assert "more than 1 blocks are damaged" in limited["message"]


def twice_hurt(hurt: Path, whole: Path, folder: Path) -> Path:
    """A copy in which the block that would stand for the damaged one is damaged too."""
    shutil.copytree(hurt, folder)
    shard, block, _ = block_of_step(whole)
    offsets = np.fromfile(folder / f"s-{shard:06d}.tar.idx", dtype="<u8")
    next_block = (block + 1) % (len(offsets) - 1)
    flip_bit(folder / f"s-{shard:06d}.tar", int(offsets[next_block]) + 520)
    return folder
