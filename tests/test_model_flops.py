"""FLOPs of a step are those of its matrix products, whatever is computed twice."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dist_lm.model_flops import Counted, Utilization

pytestmark = pytest.mark.fast
B, T, H, D = 2, 16, 4, 8
"""Rows, tokens, heads, width of a head."""


def counted(work: object) -> int:
    with Counted() as counter:
        work()  # type: ignore[operator]
    return counter.flops


def test_a_linear_layer_takes_six_flops_a_weight_and_token() -> None:
    layer = nn.Linear(32, 64, bias=False)
    inputs = torch.randn(B * T, 32, requires_grad=True)
    assert counted(lambda: layer(inputs).sum().backward()) == 6 * 32 * 64 * B * T


def test_frozen_weights_take_no_gradient_of_theirs() -> None:
    layer = nn.Linear(32, 64, bias=False).requires_grad_(False)
    inputs = torch.randn(B * T, 32, requires_grad=True)
    assert counted(lambda: layer(inputs).sum().backward()) == 4 * 32 * 64 * B * T


def test_what_a_backward_pass_computes_again_counts_once() -> None:
    layer = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    inputs = torch.randn(B * T, 32, requires_grad=True)
    plain = counted(lambda: layer(inputs).sum().backward())
    for reentrant in (True, False):
        again = counted(lambda: checkpoint(layer, inputs, use_reentrant=reentrant).sum().backward())  # noqa: B023
        assert again == plain == 2 * 6 * 32 * 64 * B * T


def test_attention_counts_two_products_forward_and_four_backward() -> None:
    # The kernel of the CPU, which torch's own counter leaves out.
    query, key, value = (torch.randn(B, H, T, D, requires_grad=True) for _ in range(3))
    attend = nn.functional.scaled_dot_product_attention
    product = 2 * B * H * T * T * D
    assert counted(lambda: attend(query, key, value)) == 2 * product
    assert counted(lambda: attend(query, key, value).sum().backward()) == 6 * product


def test_the_first_step_of_the_first_rank_is_counted_and_gives_the_rate_of_all() -> None:
    ranks = SimpleNamespace(is_first=True, world_size=2, device=torch.device("cpu"))
    layer, inputs = nn.Linear(32, 64, bias=False), torch.randn(B * T, 32, requires_grad=True)
    utilization = Utilization(ranks, "fp32", peak_tflops=1e-6)  # type: ignore[arg-type]
    assert utilization.rates(1000.0) == {}
    for _ in range(2):
        with utilization.step(slots=B * T):
            layer(inputs).sum().backward()
    a_token = 6 * 32 * 64
    # Half of 1000 slots a second on each rank.
    assert utilization.rates(1000.0) == {"tflops": a_token * 500 / 1e12, "mfu": pytest.approx(a_token * 500 / 1e6)}
    unknown = Utilization(ranks, "fp32", None)  # type: ignore[arg-type]
    with unknown.step(slots=B * T):
        layer(inputs).sum().backward()
    assert set(unknown.rates(1000.0)) == {"tflops"}, "nobody knows the peak of a CPU"
    other = Utilization(SimpleNamespace(**{**vars(ranks), "is_first": False}), "fp32", 1.0)  # type: ignore[arg-type]
    with other.step(slots=B * T):
        layer(inputs).sum().backward()
    assert other.rates(1000.0) == {}
