"""Memory of states, traffic and devices: what the papers and counted collectives say."""

from __future__ import annotations

from typing import Any

import pytest

from dist_lm.accelerators import ACCELERATORS, accelerator, known_as
from dist_lm.driven import reduces_itself
from dist_lm.errors import ConfigError
from dist_lm.plan.states import States, states
from dist_lm.plan.traffic import LATENCY_S, Topology, traffic

pytestmark = pytest.mark.fast
P = 1_000_000


def held(stage: int, ranks: int = 8, precision: str = "bf16", micro_steps: int = 1, **zero: Any) -> States:
    settings = {"zero_optimization": {**zero, "stage": stage}, "fp16": {"enabled": precision == "fp16"}}
    own = reduces_itself(settings)
    return states(
        P, 0, stage=stage, ranks=ranks, precision=precision, micro_steps=micro_steps, zero=zero, own_reduction=own
    )


@pytest.mark.parametrize(("stage", "bytes_a_parameter"), [(0, 2 + 12), (1, 2 + 12 / 8), (2, 2 + 12 / 8), (3, 14 / 8)])
def test_weights_and_optimizer_states_are_those_of_the_zero_paper(stage: int, bytes_a_parameter: float) -> None:
    assert held(stage).between_steps == bytes_a_parameter * P


def test_gradients_shrink_with_the_stage() -> None:
    gradients = [held(stage).gradients for stage in range(4)]
    assert gradients == [2 * P, 2 * P + 4 * P / 8, 2 * P / 8 + 4 * P / 8, 2 * P / 8]


def test_gradients_of_several_micro_steps_are_summed_in_fp32() -> None:
    assert held(3, micro_steps=4).gradients == 4 * P / 8
    # Stage 2 reduces once, at the end: until then every rank holds all of them, in the optimizer's type already.
    assert held(2, micro_steps=4).gradients == 4 * P
    assert held(2, micro_steps=4, precision="fp16").gradients == 4 * P + 4 * P / 8


def test_on_one_rank_in_fp32_stage_0_holds_16_bytes_a_parameter() -> None:
    alone = held(0, ranks=1, precision="fp32")
    assert alone.between_steps + alone.gradients == 16 * P
    assert alone.buffers == alone.reduction == 0
    # Activations are gone before the optimizer steps: nothing of its own is needed then.
    assert alone.peak(0, activations=5 * P, with_gradients=8 * P) == 12 * P + 8 * P


def test_what_is_offloaded_is_the_hosts() -> None:
    there = held(2, offload_optimizer={"device": "cpu"})
    assert there.optimizer == 0
    assert there.host == held(2).optimizer + 4 * P / 8
    whole = held(3, offload_optimizer={"device": "cpu"}, offload_param={"device": "nvme"})
    assert whole.weights == 0
    assert whole.host == there.host + 2 * P / 8


def test_stage_1_reduces_in_place_and_stage_2_in_a_few_buckets() -> None:
    assert held(1).buffers == held(1).reduction == 0
    assert held(1).whole_gradients == 2 * P
    assert held(2).buffers == 2 * P, "no more than the model"
    few = held(2, reduce_bucket_size=1000)
    assert few.buffers == few.reduction == 3 * 2 * 1000
    assert few.peak(2, activations=7 * P, with_gradients=8 * P) == few.between_steps + 2 * P / 8 + 6000 + 7 * P


def test_buckets_of_deepspeeds_own_reduction_are_no_larger_than_the_model() -> None:
    assert held(1, precision="fp16").reduction == held(2, precision="fp16").buffers == 2 * P
    assert held(1, precision="fp16", reduce_bucket_size=1000).reduction == 2 * 1000
    assert held(1, precision="fp16", reduce_bucket_size=1000, overlap_comm=True).reduction == 2 * 2 * 1000
    assert held(1, precision="fp16").buffers == 0


def test_zero_3_holds_whole_weights_twice_while_they_are_gathered_and_a_bucket() -> None:
    little = {"reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 5000, "stage3_max_live_parameters": 10_000}
    three = held(3, **little)
    assert (three.gathered, three.buffers) == (2 * 10_000, 2 * 1000 + 2 * 5000)
    passes = three.gathered + three.gradients + three.buffers + 7 * P
    assert three.peak(3, activations=7 * P, with_gradients=8 * P) == three.between_steps + passes


def test_gradients_of_several_micro_steps_wait_beside_the_activations() -> None:
    several = held(1, micro_steps=2)
    assert several.peak(1, activations=50 * P, with_gradients=51 * P) == several.between_steps + 4 * P + 50 * P
    assert held(3, micro_steps=2).whole_gradients == 0


@pytest.mark.parametrize(("stage", "micro_steps", "volume"), [(0, 1, 2), (1, 4, 3), (2, 4, 3), (3, 1, 3), (3, 4, 12)])
def test_volumes_are_multiples_of_the_weights(stage: int, micro_steps: int, volume: int) -> None:
    sent = traffic(1e9, stage=stage, ranks=2, micro_steps=micro_steps, gathers=66)
    assert sent.wire_bytes == volume * 1e9 / 2


def test_one_rank_sends_nothing_and_waits_for_nothing() -> None:
    topology = Topology(1, 8, 360, 45)
    assert traffic(1e9, stage=1, ranks=1, micro_steps=1, gathers=1).seconds(topology, 1.0) == 0.0


def test_between_hosts_the_ports_of_a_host_share_the_bytes() -> None:
    inside, across = Topology(8, 8, 360, 12), Topology(16, 8, 360, 12)
    sent = traffic(1e9, stage=1, ranks=8, micro_steps=1, gathers=1)
    assert (inside.gb_s, across.gb_s) == (360, 8 * 12)
    assert Topology(16, 8, 360, 100).gb_s == 360
    assert sent.seconds(across, 0.0) > sent.seconds(inside, 0.0)


def test_reductions_hide_behind_the_backward_pass() -> None:
    topology = Topology(16, 8, 360, 45)
    sent = traffic(1e9, stage=0, ranks=16, micro_steps=1, gathers=1)
    assert sent.seconds(topology, 10.0) == pytest.approx(2 * 16 * LATENCY_S)


def test_an_unknown_accelerator_is_refused_with_the_list() -> None:
    with pytest.raises(ConfigError, match=r"there is no accelerator `h1000`(?s:.*)h100, .*cpu"):
        accelerator("h1000")


def test_a_device_without_bf16_is_refused_for_it() -> None:
    assert accelerator("v100").peak_flops("fp16") == 125e12
    with pytest.raises(ConfigError, match="v100 has no bf16"):
        accelerator("v100").peak_flops("bf16")


def test_every_device_is_found_by_its_name() -> None:
    assert all(accelerator(name).name == name for name in ACCELERATORS)


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("Tesla V100-SXM2-32GB", "v100"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
    ],
)
def test_a_device_is_known_by_the_name_that_its_driver_gives(device: str, name: str) -> None:
    found = known_as(device)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "device", ["NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA L40", "NVIDIA A10"]
)
def test_a_device_with_other_peaks_is_not_taken_for_the_known_one(device: str) -> None:
    assert known_as(device) is None
