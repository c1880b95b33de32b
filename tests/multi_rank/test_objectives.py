"""Causal LM, span corruption, frozen layers and LoRA: what the maths demands of any number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_lm import lora
from dist_lm.checkpoint.commit import published
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.config import LoraSection
from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.tokenizer import train_tokenizer
from dist_lm.errors import ConfigError, DataError
from dist_lm.run_dir import RunDir
from dist_lm.run_model import model_of_run, weights_of_run
from tests.rank_scenarios import heldout_loss, losses, scenario, train_scenarios

CLOSE = 1e-5
"""Relative: fp32 sums in another order differ by about 1e-6."""
SEQ_LEN = 48
MODELS: dict[str, dict[str, Any]] = {
    "causal": {
        "family": "llama",
        "size": "tiny",
        "overrides": {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 64},
    },
    "span": {
        "family": "t5",
        "size": "tiny",
        "overrides": {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2, "d_kv": 16, "dropout_rate": 0.0},
    },
}
TASKS: dict[str, dict[str, Any]] = {
    # Small chunks: the head is computed again in the backward pass, at every stage.
    "causal": {"name": "causal_lm", "documents": "isolated", "head_chunk": 100},
    "span": {"name": "span_corruption", "head_chunk": 60},
}
ALL_STAGES = (0, 1, 2, 3)
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
PARTS: dict[str, dict[str, Any]] = {
    "frozen": {"freeze_layers": 1},
    "lora": {"lora": LORA},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    texts = [topics[name] for name in sorted(topics)]
    source = folder / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for objective, kind in (("causal", "bpe"), ("span", "t5")):
        train_tokenizer(texts, vocab_size=700, kind=kind, out=folder / objective / "tokenizer")
        prepare(
            PrepareOptions(
                [str(source)],
                folder / objective / "tokens",
                folder / objective / "tokenizer",
                kind="tokens",
                heldout_fraction=0.05,
                workers=1,
            )
        )
    return folder


def config(data: Path, run_dir: Path, objective: str, **changes: Any) -> dict[str, Any]:
    made = scenario(data, run_dir, task=TASKS[objective], model=MODELS[objective], zero=0)
    folder = data / objective
    made["data"] = {
        "train": str(folder / "tokens" / "train"),
        "heldout": str(folder / "tokens" / "heldout"),
        "tokenizer": str(folder / "tokenizer"),
        "seq_len": SEQ_LEN,
        "lanes": 4,
        "era": 16,
    }
    made["optim"] = {"lr": 2e-3, "clip": 0.5, "schedule": {"kind": "constant"}}
    for dotted, value in changes.items():
        *sections, name = dotted.split("__")
        target = made
        for part in sections:
            target = target.setdefault(part, {})
        target[name] = value
    return made


def in_two_parts(whole: dict[str, Any], run_dir: Path) -> list[dict[str, Any]]:
    """The same run, ended after its first checkpoint and gone on with."""
    run = {**whole["run"], "dir": str(run_dir), "allow_change": ["run.steps"]}
    return [{**whole, "run": {**run, "steps": 3}}, {**whole, "run": run}]


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of this module: one start of one rank, two starts of two."""
    root = tmp_path_factory.mktemp("objectives")
    alone, together, over = [], [], []
    for objective in MODELS:
        alone.append(config(data, root / f"{objective}-1", objective))
        alone.append(config(data, root / f"{objective}-1-accumulated", objective, batch__micro=8))
        for stage in ALL_STAGES:
            run_dir = root / f"{objective}-2-zero{stage}"
            together.append(config(data, run_dir, objective, zero=stage, batch__micro=8))
        together += in_two_parts(together[-1], root / f"{objective}-2-zero3-again")
    train_scenarios(root, alone, num_ranks=1)
    train_scenarios(root, together, num_ranks=2)
    first_weights = str(root / "causal-2-zero2")
    for part, settings in PARTS.items():
        model = {"from": first_weights, **settings}
        whole = [
            config(data, root / f"{part}-zero{stage}", "causal", model=model, zero=stage, optim__layer_decay=0.5)
            for stage in ALL_STAGES
        ]
        over += whole
        for stage in (2, 3):
            over += in_two_parts(whole[stage], root / f"{part}-zero{stage}-again")
            low = {**whole[stage], "precision": "bf16"}
            low["run"] = {**low["run"], "dir": str(root / f"{part}-bf16-zero{stage}")}
            over += [low, *in_two_parts(low, root / f"{part}-bf16-zero{stage}-again")]
    over.append(config(data, root / "frozen-without-decay", "causal", model={"from": first_weights, **PARTS["frozen"]}))
    train_scenarios(root / "over", over, num_ranks=2)
    return root


@pytest.mark.parametrize("objective", MODELS)
@pytest.mark.parametrize("name", ["1-accumulated", *(f"2-zero{stage}" for stage in ALL_STAGES)])
def test_losses_do_not_depend_on_how_the_batch_is_divided(runs: Path, objective: str, name: str) -> None:
    reference, divided = losses(runs / f"{objective}-1"), losses(runs / f"{objective}-{name}")
    assert sorted(divided) == list(range(1, 7))
    assert list(divided.values()) == pytest.approx(list(reference.values()), rel=CLOSE)
    assert heldout_loss(runs / f"{objective}-{name}") == pytest.approx(heldout_loss(runs / f"{objective}-1"), rel=CLOSE)
    assert reference[6] < reference[1] - 0.05


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("stage", ALL_STAGES[1:])
def test_parts_of_a_model_train_alike_at_every_stage(runs: Path, part: str, stage: int) -> None:
    reference, other = losses(runs / f"{part}-zero0"), losses(runs / f"{part}-zero{stage}")
    assert list(other.values()) == pytest.approx(list(reference.values()), rel=CLOSE)
    # Far more than rounding: six steps of a part of the model.
    assert heldout_loss(runs / f"{part}-zero{stage}") < heldout_loss(runs / "causal-2-zero2") - 5e-4


@pytest.mark.parametrize(
    ("again", "whole"),
    [
        *((f"{objective}-2-zero3-again", f"{objective}-2-zero3") for objective in MODELS),
        *((f"{part}-zero{stage}-again", f"{part}-zero{stage}") for part in PARTS for stage in (2, 3)),
        *((f"{part}-bf16-zero{stage}-again", f"{part}-bf16-zero{stage}") for part in PARTS for stage in (2, 3)),
    ],
)
def test_resumed_losses_equal_the_uninterrupted_ones_to_the_last_bit(runs: Path, again: str, whole: str) -> None:
    assert losses(runs / again) == losses(runs / whole)
    assert len(list((runs / again / "attempts").glob("*.json"))) == 2


def test_a_run_folder_hands_on_what_it_learned(runs: Path) -> None:
    learned, fresh = losses(runs / "causal-2-zero2"), losses(runs / "frozen-zero0")
    # Other rows than those of its first step would lie near the loss that the first run ended with.
    assert abs(fresh[1] - learned[6]) < abs(fresh[1] - learned[1])


def test_layer_decay_slows_the_lower_layers(runs: Path) -> None:
    assert losses(runs / "frozen-zero0")[1] == losses(runs / "frozen-without-decay")[1]
    assert losses(runs / "frozen-zero0")[3] != losses(runs / "frozen-without-decay")[3]


@pytest.mark.parametrize("stage", ALL_STAGES)
def test_checkpoints_hold_what_is_trained(runs: Path, stage: int) -> None:
    held = {part: set(newest(runs / f"{part}-zero{stage}").parameters) for part in PARTS}
    assert held["lora"]
    assert all(".lora_" in name for name in held["lora"])
    assert held["frozen"]
    assert not any(name.startswith(("model.embed_tokens", "model.layers.0")) for name in held["frozen"])


def newest(run: Path) -> Checkpoint:
    return Checkpoint.load(published(run / "checkpoints")[0])


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    found: torch.Tensor = model.eval()(input_ids=torch.arange(20)[None], use_cache=False).logits
    return found


@pytest.mark.parametrize("part", PARTS)
def test_the_model_of_a_run_is_whole(runs: Path, part: str) -> None:
    run = runs / f"{part}-zero2"
    whole = model_of_run(RunDir(run), newest(run))
    expected = logits_of(whole)
    plain = AutoModelForCausalLM.from_config(whole.config)
    plain.load_state_dict(weights_of_run(run))
    assert torch.allclose(logits_of(plain), expected, rtol=1e-4, atol=1e-5)
    before = AutoModelForCausalLM.from_config(whole.config)
    before.load_state_dict(weights_of_run(runs / "causal-2-zero2"))
    assert not torch.allclose(logits_of(before), expected, rtol=1e-3)


def test_a_saved_adapter_loads_with_peft(runs: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    run = runs / "lora-zero3"
    whole = model_of_run(RunDir(run), newest(run))
    lora.save_adapter(whole, LoraSection(**LORA), tmp_path / "adapter", base=tmp_path / "base")
    base = AutoModelForCausalLM.from_config(whole.config)
    base.load_state_dict(weights_of_run(runs / "causal-2-zero2"))
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits_of(loaded), logits_of(whole))


def test_frozen_weights_that_changed_are_refused(runs: Path, data: Path, tmp_path: Path) -> None:
    run = RunDir(runs / "lora-zero1")
    text = run.config.read_text()
    # The first run, in place of the one whose weights were frozen.
    run.config.write_text(
        text.replace("causal-2-zero2", "span-2-zero2").replace("span-2-zero2", "causal-1-accumulated")
    )
    try:
        with pytest.raises(DataError, match="no longer those that the run was begun with"):
            model_of_run(run, newest(run.path))
    finally:
        run.config.write_text(text)


def test_a_run_folder_without_a_whole_checkpoint_is_no_beginning(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "causal-1", tmp_path / "run")
    file = next(published(tmp_path / "run" / "checkpoints")[0].glob("rank-*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged"):
        weights_of_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(ConfigError, match="has no checkpoint"):
        weights_of_run(tmp_path / "run")
