"""Which parts of a step DeepSpeed does, and which the engine does."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_lm import driven
from dist_lm.config import RunConfig
from dist_lm.deepspeed_config import resolve
from tests.rank_scenarios import scenario

pytestmark = pytest.mark.fast


def zero(stage: int, **more: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": stage, **more}}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("more", [{}, {"bf16": {"enabled": True}}, {"fp16": {"enabled": False}}])
def test_stages_1_and_2_reduce_by_themselves(stage: int, more: dict[str, Any]) -> None:
    assert driven.reduces_itself({**zero(stage), **more})


@pytest.mark.parametrize(
    "settings",
    [
        zero(0),
        zero(3),
        {**zero(1), "fp16": {"enabled": True}},
        {**zero(1), "communication_data_type": "fp32"},
        {**zero(2), "compile": {"deepcompile": True}},
        zero(2, offload_optimizer={"device": "cpu"}),
        zero(1, reduce_scatter=False),
        zero(1, round_robin_gradients=True),
    ],
)
def test_what_only_deepspeed_can_do_is_left_to_it(settings: dict[str, Any]) -> None:
    assert not driven.reduces_itself(settings)


def test_what_is_handed_over_is_not_done_twice() -> None:
    settings = {**zero(2), "bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    assert driven.hand_over_reduction(settings) is torch.float32
    assert settings["zero_optimization"]["compute_grad_norm"] is False
    assert settings["bf16"]["check_grad_overflow"] is False
    # With it DeepSpeed would take another optimizer, that reduces by itself.
    assert settings["data_types"] == {}


def resolved(tmp_path: Any, stage: int, num_parameters: int, **changes: Any) -> dict[str, Any]:
    config = RunConfig.model_validate(scenario(tmp_path, tmp_path / "run", zero=stage, **changes))
    settings = resolve(config, world_size=2, micro_rows=16, micro_steps=1, num_parameters=num_parameters).settings
    block: dict[str, Any] = settings["zero_optimization"]
    return block


def test_buckets_follow_from_the_size_of_the_model(tmp_path: Any) -> None:
    assert resolved(tmp_path, 1, 100_000_000)["reduce_bucket_size"] == 12_500_000
    assert resolved(tmp_path, 2, 5_000)["reduce_bucket_size"] == 1_000_000
    assert resolved(tmp_path, 2, 10**11)["reduce_bucket_size"] == 200_000_000
    assert resolved(tmp_path, 3, 5_000_000)["reduce_bucket_size"] == 5_000_000
    assert "reduce_bucket_size" not in resolved(tmp_path, 0, 5_000_000)


def test_stage_3_gathers_again_for_gradients_only_where_weights_were_let_go(tmp_path: Any) -> None:
    assert resolved(tmp_path, 3, 10**9)["memory_efficient_linear"] is False
    assert "memory_efficient_linear" not in resolved(tmp_path, 3, 10**9 + 1)


def test_what_the_deepspeed_file_says_stays(tmp_path: Any) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"zero_optimization": {"reduce_bucket_size": 77, "memory_efficient_linear": true}}')
    block = resolved(tmp_path, 3, 1_000, deepspeed=str(file))
    assert (block["reduce_bucket_size"], block["memory_efficient_linear"]) == (77, True)


def test_stage_3_gathers_once_where_all_weights_may_be_whole() -> None:
    assert driven.gathers_once(zero(3), 10**9)
    assert driven.gathers_once(zero(3, offload_optimizer={"device": "cpu"}), 10**9)
    assert not driven.gathers_once(zero(3), 10**9 + 1)
    assert not driven.gathers_once(zero(3, stage3_max_live_parameters=99), 100)
    assert not driven.gathers_once(zero(2), 100)


@pytest.mark.parametrize(
    "settings",
    [
        zero(3, offload_param={"device": "cpu"}),
        zero(3, zero_hpz_partition_size=2),
        zero(3, stage3_module_granularity_threshold=1),
        {**zero(3), "compile": {"deepcompile": True}},
    ],
)
def test_weights_that_only_deepspeed_can_gather_are_left_to_it(settings: dict[str, Any]) -> None:
    assert not driven.gathers_once(settings, 100)


def test_weights_that_are_gathered_together_are_not_kept_whole_one_by_one() -> None:
    settings = zero(3, stage3_param_persistence_threshold=1000)
    driven.hand_over_gathering(settings)
    assert settings["zero_optimization"]["stage3_param_persistence_threshold"] == 0
