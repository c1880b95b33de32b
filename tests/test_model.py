"""Models of every family and size, from a config, from a folder, from a run; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from dist_lm import model as models
from dist_lm.assemble import model_facts
from dist_lm.config import ModelSection, RunConfig
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError, DataError
from dist_lm.model_sizes import SIZES
from tests.token_rows import train_kind

pytestmark = pytest.mark.fast
CLASSES = {"gpt2": AutoModelForCausalLM, "llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}
MILLIONS = {
    ("bert", "base"): 110,
    ("roberta", "base"): 125,
    ("modernbert", "base"): 149,
    ("modernbert", "large"): 395,
    ("gpt2", "base"): 124,
    ("gpt2", "large"): 774,
    ("gpt2", "1b"): 1558,
    ("llama", "base"): 134.5,
    ("llama", "large"): 362,
    ("llama", "1b"): 1236,
    ("llama", "7b"): 6738,
    ("t5", "tiny"): 15.6,
    ("t5", "mini"): 31,
    # Less one matrix of embeddings, which transformers shares: 77, 248 and 783 with it.
    ("t5", "small"): 77 - 16.4,
    ("t5", "base"): 248 - 24.7,
    ("t5", "large"): 783 - 32.9,
}
"""Parameters that the sources of the sizes tell, with the vocabularies of their models."""
RUN: dict[str, Any] = {
    "task": {"name": "mlm"},
    "data": {"train": "data", "tokenizer": "tokenizer"},
    "batch": {"global": 8, "micro": 8},
    "optim": {"lr": 1e-3},
    "run": {"dir": "run", "steps": 1},
}
VOCABULARIES = {
    "bert": 30522,
    "roberta": 50265,
    "modernbert": 50368,
    "gpt2": 50257,
    "llama": {"base": 49152, "large": 49152, "1b": 128256, "7b": 32000},
    "t5": 32128,
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("model")
    return {kind: train_kind(root, kind) for kind in ("wordpiece", "bpe", "t5")}


def kind_of(family: str) -> str:
    return {"gpt2": "bpe", "llama": "bpe", "t5": "t5"}.get(family, "wordpiece")


def build(tokenizers: dict[str, Tokenizer], section: ModelSection, family: str = "bert", positions: int = 64) -> Any:
    auto_class = CLASSES.get(section.family or family, AutoModelForMaskedLM)
    tokenizer = tokenizers[kind_of(section.family or family)]
    return models.build(section, tokenizer, auto_class, family=family, positions=positions, seed=1)


@pytest.mark.parametrize(("family", "size"), MILLIONS)
def test_named_sizes_have_the_parameters_of_their_sources(
    tokenizers: dict[str, Tokenizer], family: Any, size: Any
) -> None:
    vocabulary = VOCABULARIES[family]
    tokens = vocabulary[size] if isinstance(vocabulary, dict) else vocabulary
    section = ModelSection(family=family, size=size, overrides={"vocab_size": tokens})
    config = models.new_config(section, tokenizers[kind_of(family)], family=family, positions=64)
    with torch.device("meta"):
        model = CLASSES.get(family, AutoModelForMaskedLM).from_config(config)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert millions == pytest.approx(MILLIONS[family, size], rel=0.02)


@pytest.mark.parametrize("family", SIZES)
def test_equal_seeds_give_equal_weights_that_know_their_special_tokens(
    tokenizers: dict[str, Tokenizer], family: Any
) -> None:
    section = ModelSection(family=family, size="tiny")
    first, second = build(tokenizers, section), build(tokenizers, section)
    assert all(torch.equal(one, two) for one, two in zip(first.parameters(), second.parameters(), strict=True))
    tokenizer = tokenizers[kind_of(family)]
    assert first.config.pad_token_id == tokenizer.pad_id
    assert first.config.eos_token_id == tokenizer.special.get("eos_token")
    assert first.config.vocab_size == tokenizer.vocab_size
    assert "mini" in SIZES[family]


def test_an_override_counts_by_either_of_its_names(tokenizers: dict[str, Tokenizer]) -> None:
    for name in ("n_embd", "hidden_size"):
        assert build(tokenizers, ModelSection(family="gpt2", size="tiny", overrides={name: 64})).config.n_embd == 64


def test_a_longer_row_gets_more_positions_where_they_are_new(tokenizers: dict[str, Tokenizer]) -> None:
    roberta = build(tokenizers, ModelSection(family="roberta", size="tiny"), positions=600)
    pad = tokenizers["wordpiece"].pad_id
    assert roberta.config.max_position_embeddings == 600 + pad + 1
    ids = torch.full((1, 600), 50)
    assert roberta(input_ids=ids).logits.shape == (1, 600, tokenizers["wordpiece"].vocab_size)


def test_attention_and_recomputation_reach_the_model(tokenizers: dict[str, Tokenizer]) -> None:
    model = build(
        tokenizers, ModelSection(family="llama", size="tiny", attention="eager", activation_checkpointing=True)
    )
    assert model.config._attn_implementation == "eager"
    assert model.is_gradient_checkpointing


def test_recomputed_activations_give_the_same_gradients(tokenizers: dict[str, Tokenizer]) -> None:
    gradients = []
    for again in (False, True):
        model = build(tokenizers, ModelSection(family="gpt2", size="tiny", activation_checkpointing=again)).train()
        torch.manual_seed(5)
        model(input_ids=torch.arange(32)[None], labels=torch.arange(32)[None], use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("section", "words"),
    [
        (ModelSection(family="t5", size="7b"), "there is no t5 of size 7b"),
        (ModelSection(size="tiny", overrides={"n_embd": 64}), "the config of bert has no field n_embd"),
        (ModelSection(size="tiny", overrides={"hidden_size": 30, "num_attention_heads": 4}), "transformers refuses"),
        (ModelSection(config=Path("nowhere.json")), "nowhere.json cannot be read"),
        (ModelSection.model_validate({"from": "nowhere"}), "neither a Hugging Face model folder nor a run folder"),
    ],
)
def test_what_makes_no_model_is_refused(tokenizers: dict[str, Tokenizer], section: ModelSection, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(tokenizers, section)


def test_a_config_of_an_unknown_type_is_refused(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, words in (('{"model_type": "brain"}', "no model of type brain"), ("{}", "not a Hugging Face config")):
        path.write_text(content)
        with pytest.raises(ConfigError, match=words):
            build(tokenizers, ModelSection(config=path))


@pytest.fixture(scope="module")
def bert_folder(tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model"
    build(tokenizers, ModelSection(size="tiny")).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tokenizers["wordpiece"].path / name).read_bytes())
    return folder


def from_folder(folder: Path, **settings: Any) -> ModelSection:
    return ModelSection.model_validate({"from": str(folder), **settings})


def test_weights_come_from_a_folder(tokenizers: dict[str, Tokenizer], bert_folder: Path) -> None:
    fresh, loaded = build(tokenizers, ModelSection(size="tiny")), build(tokenizers, from_folder(bert_folder))
    assert all(torch.equal(one, two) for one, two in zip(fresh.parameters(), loaded.parameters(), strict=True))


def test_rows_that_a_folder_has_no_positions_for_are_named(tokenizers: dict[str, Tokenizer], bert_folder: Path) -> None:
    with pytest.raises(DataError, match="model inputs of 513 tokens do not fit a model with 512 positions") as caught:
        build(tokenizers, from_folder(bert_folder), positions=513)
    assert "512 tokens at most" in str(caught.value)


def test_another_tokenizer_is_refused_unless_embeddings_are_made_anew(
    tokenizers: dict[str, Tokenizer], bert_folder: Path, tmp_path: Path
) -> None:
    other = tokenizers["bpe"]
    assert other.vocab_size == tokenizers["wordpiece"].vocab_size
    with pytest.raises(DataError, match="trained with another tokenizer"):
        models.load(bert_folder, AutoModelForMaskedLM, other, positions=64)
    larger = tokenizers["t5"]
    with pytest.raises(DataError, match="the model knows 600 tokens, the tokenizer has 700"):
        models.load(bert_folder, AutoModelForMaskedLM, larger, positions=64)
    model, _ = models.load(
        bert_folder,
        AutoModelForMaskedLM,
        larger,
        positions=64,
        section=from_folder(bert_folder, resize_embeddings=True),
    )
    assert model.get_input_embeddings().weight.shape[0] == 700
    assert model(input_ids=torch.tensor([[699]])).logits.shape[-1] == 700


def test_a_vocabulary_that_is_padded_is_accepted(
    tokenizers: dict[str, Tokenizer], bert_folder: Path, tmp_path: Path
) -> None:
    padded = build(tokenizers, ModelSection(size="tiny", overrides={"vocab_size": 640}))
    padded.save_pretrained(tmp_path / "padded")
    assert build(tokenizers, from_folder(tmp_path / "padded")).config.vocab_size == 640


@pytest.mark.parametrize("key", ["overrides", "family"])
def test_keys_without_effect_beside_from_are_refused(
    tokenizers: dict[str, Tokenizer], bert_folder: Path, key: str
) -> None:
    value: Any = {"hidden_size": 3} if key == "overrides" else "bert"
    with pytest.raises(ConfigError, match=rf"model\.{key} has no effect beside model\.from"):
        build(tokenizers, from_folder(bert_folder, **{key: value}))


def test_a_model_without_such_a_head_is_refused(
    tokenizers: dict[str, Tokenizer], bert_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 600}))
    with pytest.raises(ConfigError, match="transformers refuses"):
        build(tokenizers, ModelSection(config=tmp_path / "config.json"))
    with pytest.raises(ConfigError, match="a bert is no model for AutoModelForSeq2SeqLM"):
        models.load(bert_folder, AutoModelForSeq2SeqLM, tokenizers["wordpiece"], positions=64)


def test_another_config_in_the_same_run_folder_is_noticed(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    facts = []
    for dropout in (0.0, 0.0, 0.1):
        path.write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 1, "hidden_dropout_prob": dropout}))
        values = {**RUN, "model": {"config": str(path)}}
        config = RunConfig.model_validate(values)
        facts.append(model_facts(config, build(tokenizers, config.model)))
    assert facts[0] == facts[1] != facts[2]
    assert set(facts[0]) == {"model.config"}


def test_a_model_that_cannot_recompute_is_refused(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "mpnet", "num_hidden_layers": 1}))
    with pytest.raises(ConfigError, match="MPNetForMaskedLM cannot recompute its activations"):
        build(tokenizers, ModelSection(config=path, activation_checkpointing=True))
