"""torch.compile as an option: what it says where no compiler works, and equal results where one does."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor.config
from transformers import BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from dist_lm.compiled import compile_layers
from dist_lm.config import RunConfig
from dist_lm.errors import ConfigError
from tests.rank_scenarios import scenario

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CLOSE = 1e-5


def small_bert() -> BertForMaskedLM:
    torch.manual_seed(0)
    model = BertForMaskedLM(BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
    return model.train()


def loss_and_gradients(model: Any, length: int) -> tuple[float, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, SMALL["vocab_size"], (4, length))
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.fixture(autouse=True)
def _forget_what_was_compiled() -> Any:
    suppressed = torch._dynamo.config.suppress_errors
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.suppress_errors = suppressed


def test_without_a_compiler_the_model_trains_as_it_is_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Nothing of an earlier compilation is found.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = small_bert()
    expected = loss_and_gradients(model, 16)
    with torch._inductor.config.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}), caplog.at_level(logging.WARNING):
        assert not compile_layers(model)
        loss, gradients = loss_and_gradients(model, 16)
    (said,) = [record.getMessage() for record in caplog.records if record.name == "dist_lm.compiled"]
    assert "torch.compile does not work here" in said
    assert loss == expected[0]
    assert torch.equal(gradients, expected[1])


def test_the_trial_is_made_on_the_device_of_the_model(caplog: pytest.LogCaptureFixture) -> None:
    # Nothing has values there.
    assert not compile_layers(small_bert().to("meta"))
    assert "torch.compile does not work here" in caplog.text


def test_stage_3_refuses_to_compile(tmp_path: Path) -> None:
    with pytest.raises((ConfigError, ValueError), match=r"model\.compile needs zero 0, 1 or 2"):
        RunConfig.model_validate(scenario(tmp_path, tmp_path / "run", zero=3, model__compile=True))


@pytest.mark.soak
def test_compiled_layers_give_the_same_loss_and_gradients_at_any_length(caplog: pytest.LogCaptureFixture) -> None:
    assert shutil.which("g++"), "the test needs a C++ compiler"
    plain, compiled = small_bert(), small_bert()
    with caplog.at_level(logging.INFO, logger="dist_lm.compiled"):
        assert compile_layers(compiled)
    assert "2 layers are compiled" in caplog.text
    for length in (16, 24, 32):
        expected, found = loss_and_gradients(plain, length), loss_and_gradients(compiled, length)
        assert found[0] == pytest.approx(expected[0], rel=CLOSE)
        assert (found[1] - expected[1]).norm() <= CLOSE * expected[1].norm()
    # It was compiled, and not let be after a failure.
    assert torch._dynamo.utils.counters["frames"]["ok"] >= 2


@pytest.mark.soak
def test_both_stacks_of_an_encoder_with_a_decoder_are_compiled(caplog: pytest.LogCaptureFixture) -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    with caplog.at_level(logging.INFO, logger="dist_lm.compiled"):
        assert compile_layers(model)
    assert "4 layers are compiled" in caplog.text
