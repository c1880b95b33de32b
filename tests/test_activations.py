"""Activations as one operation: the same function and gradients, nothing else of the model changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AlbertConfig, AlbertModel, BertConfig, BertModel, GPT2Config, GPT2Model, T5Config, T5Model

from dist_lm.activations import fuse

pytestmark = pytest.mark.fast
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
LAYERS = 2
WRITTEN_OUT = {
    "gpt2": lambda: GPT2Model(GPT2Config(n_embd=32, n_layer=LAYERS, n_head=2, vocab_size=50)),
    "gpt2 fast": lambda: GPT2Model(
        GPT2Config(n_embd=32, n_layer=LAYERS, n_head=2, vocab_size=50, activation_function="gelu_fast")
    ),
    "albert": lambda: AlbertModel(AlbertConfig(**SMALL, embedding_size=16, vocab_size=50, num_hidden_groups=LAYERS)),
    # Encoder and decoder.
    "t5": lambda: T5Model(
        T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=50, feed_forward_proj="gated-gelu")
    ),
}


def outputs_and_gradients(model: Any) -> list[Tensor]:
    model.eval().zero_grad()
    ids = torch.arange(40).view(4, 10)
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    states = model(input_ids=ids, **inputs).last_hidden_state
    (states * torch.linspace(0, 1, states.numel()).view_as(states)).sum().backward()
    return [states.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", WRITTEN_OUT)
def test_a_written_out_activation_is_one_operation_and_the_same(family: str) -> None:
    torch.manual_seed(0)
    model = WRITTEN_OUT[family]()
    config, names = model.config.to_dict(), list(model.state_dict())
    before = outputs_and_gradients(model)
    assert fuse(model) == LAYERS
    after = outputs_and_gradients(model)
    assert len(before) > 5
    largest = max(float(tensor.abs().max()) for tensor in before)
    for as_it_was, fused in zip(before, after, strict=True):
        torch.testing.assert_close(fused, as_it_was, rtol=1e-4, atol=1e-6 * largest)
    assert model.config.to_dict() == config
    assert list(model.state_dict()) == names


def test_other_activations_stay() -> None:
    model = BertModel(BertConfig(**SMALL, vocab_size=50))
    assert fuse(model) == 0


def test_fewer_tensors_are_kept_for_the_backward_pass() -> None:
    kept: list[int] = []
    model = WRITTEN_OUT["gpt2"]().h[0].mlp
    hidden = torch.randn(3, 32, requires_grad=True)

    def kept_by() -> int:
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            model(hidden)
        return sum(kept)

    before = kept_by()
    fuse(model)
    assert kept_by() < before
