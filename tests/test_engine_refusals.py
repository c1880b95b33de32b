"""What an engine refuses: the state of another optimizer, and an op that nothing can compile."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch._C._distributed_c10d import HashStore
from transformers import BertConfig, BertForMaskedLM

from dist_lm import ops
from dist_lm.checkpoint.fragments import WEIGHT, restore
from dist_lm.config import OptimSection
from dist_lm.engine import Engine
from dist_lm.errors import ConfigError, DataError, EnvironmentFault
from dist_lm.ranks import Ranks

pytestmark = pytest.mark.fast
TINY = BertConfig(vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """The only rank of a gloo group."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(ops.extensions_folder()))
    monkeypatch.setenv("PATH", ops.own_tools_path())
    ops.build_cpu_op()
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield Ranks(0, 0, 1, torch.device("cpu"), None)
    distributed.destroy_process_group()


def engine(ranks: Ranks, optimizer: str = "adamw", precision: str = "fp32", **zero: object) -> Engine:
    low = {} if precision == "fp32" else {precision: {"enabled": True}}
    settings = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **low}
    return Engine(
        BertForMaskedLM(TINY),
        None,  # type: ignore[arg-type] # nothing is computed
        optim=OptimSection(name=optimizer, lr=1e-3),  # type: ignore[arg-type]
        deepspeed_settings=settings,
        ranks=ranks,
        seed=0,
    )


class OfSgd:
    """What a checkpoint of SGD with momentum holds."""

    def keys(self) -> set[str]:
        return {WEIGHT, "momentum_buffer"}

    def read(self, name: str, key: str, start: int, size: int) -> torch.Tensor:
        raise AssertionError("nothing is read before the optimizer is known to fit")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_the_device_lacks_is_refused(
    alone: Ranks, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from deepspeed.accelerator import get_accelerator

    # What DeepSpeed says of a CPU depends on the CPU.
    monkeypatch.setattr(get_accelerator(), f"is_{precision}_supported", lambda: False)
    with pytest.raises(ConfigError, match=f"cpu of this machine has no {precision}"):
        engine(alone, precision=precision, stage=1)


def test_the_state_of_another_optimizer_is_not_loaded(alone: Ranks) -> None:
    made = engine(alone)
    before = [parameter.clone() for parameter in made.module.parameters()]
    with pytest.raises(DataError, match="the checkpoint is of another optimizer") as caught:
        restore(made, OfSgd(), {})
    assert caught.value.why == "It holds momentum_buffer, weight; this one has exp_avg, exp_avg_sq, weight."
    assert all(map(torch.equal, before, made.module.parameters()))


def test_an_op_that_no_compiler_builds_is_no_crash(
    alone: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", "/bin/false")
    with pytest.raises(EnvironmentFault, match="a DeepSpeed op could not be built") as caught:
        # A part of the states stays on the device, which torch's optimizer cannot do.
        engine(alone, stage=3, offload_optimizer={"device": "cpu", "ratio": 0.5})
    assert "cpu_adam" in caught.value.why
