"""Optimizer state and parameters that DeepSpeed keeps on the host: the same losses, and checkpoints as ever."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.multi_rank.test_equalities import CLOSE, resumed_copy
from tests.rank_scenarios import losses, scenario, train_scenarios

STAGES = {
    "zero1": {"offload_optimizer": {"device": "cpu"}},
    "zero2": {"offload_optimizer": {"device": "cpu"}},
    "zero3": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}},
}


def on_host(folder: Path, name: str) -> dict[str, Any]:
    """Changes of a scenario: its stage, and a DeepSpeed file with what goes to the host."""
    path = folder / f"{name}.json"
    sizes = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000} if name != "zero3" else {}
    path.write_text(json.dumps({"zero_optimization": {"stage": int(name[-1]), **sizes, **STAGES[name]}}))
    return {"zero": int(name[-1]), "deepspeed": str(path), "batch__micro": 8}


@pytest.fixture(scope="module")
def runs(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offload")
    begun = {name: scenario(topics_data, root / name, **on_host(root, name)) for name in STAGES}
    train_scenarios(root, [*begun.values()], num_ranks=2)
    plain = [scenario(topics_data, root / "plain")]
    for name, config in begun.items():
        plain.append(resumed_copy(root / name, root / f"{name}-plain", config, zero=0, deepspeed=None))
    train_scenarios(root, plain, num_ranks=1)
    saved = plain[0]
    again = [resumed_copy(root / name, root / f"again-{name}", config) for name, config in begun.items()]
    back = [
        resumed_copy(root / "plain", root / f"plain-{name}", saved, zero=config["zero"], deepspeed=config["deepspeed"])
        for name, config in begun.items()
    ]
    train_scenarios(root, [*again, *back], num_ranks=2)
    return root


@pytest.mark.parametrize("name", STAGES)
def test_losses_on_the_host_are_those_without(runs: Path, name: str) -> None:
    expected = [*losses(runs / "plain").values()]
    assert [*losses(runs / name).values()] == pytest.approx(expected, rel=CLOSE)


@pytest.mark.soak
def test_a_run_whose_states_are_on_nvme_equals_the_plain_one_and_goes_on_to_the_last_bit(
    topics_data: Path, tmp_path: Path
) -> None:
    """Needs libaio (`apt-get install libaio-dev`); the op is compiled at the first use."""
    place = {"device": "nvme", "nvme_path": str(tmp_path / "nvme")}
    (tmp_path / "nvme").mkdir()
    zero = {
        "stage": 3,
        "offload_optimizer": {**place, "buffer_count": 5},
        "offload_param": {**place, "buffer_count": 8},
    }
    (tmp_path / "nvme.json").write_text(json.dumps({"zero_optimization": zero}))
    changes = {"zero": 3, "deepspeed": str(tmp_path / "nvme.json"), "batch__micro": 8}
    config = scenario(topics_data, tmp_path / "run", **changes)
    train_scenarios(tmp_path, [config, scenario(topics_data, tmp_path / "plain")], num_ranks=2)
    train_scenarios(tmp_path, [resumed_copy(tmp_path / "run", tmp_path / "again", config)], num_ranks=2)
    expected = [*losses(tmp_path / "plain").values()]
    assert [*losses(tmp_path / "run").values()] == pytest.approx(expected, rel=CLOSE)
    assert losses(tmp_path / "again") == losses(tmp_path / "run")


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_on_the_host_equals_the_whole_one(runs: Path, name: str) -> None:
    assert losses(runs / f"again-{name}") == losses(runs / name)


@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("way", ["{}-plain", "plain-{}"])
def test_checkpoints_go_to_the_host_and_back(runs: Path, name: str, way: str) -> None:
    expected = [*losses(runs / "plain").values()]
    assert [*losses(runs / way.format(name)).values()] == pytest.approx(expected, rel=CLOSE)
