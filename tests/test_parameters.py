"""Which parameters are trained, how fast, and with what decay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

from dist_lm.config import ModelSection, OptimSection
from dist_lm.errors import ConfigError
from dist_lm.parameters import depths, freeze, frozen_sha256, groups

pytestmark = pytest.mark.fast
SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 40}
MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (AutoModelForMaskedLM, SMALL),
    "gpt2": (AutoModelForCausalLM, {key: value for key, value in SMALL.items() if key != "intermediate_size"}),
    "llama": (AutoModelForCausalLM, {**SMALL, "num_key_value_heads": 2}),
    "t5": (AutoModelForSeq2SeqLM, {"d_model": 16, "num_layers": 3, "num_heads": 2, "d_ff": 32, "vocab_size": 40}),
}


def make(model_type: str) -> Any:
    auto_class, fields = MODELS[model_type]
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return auto_class.from_config(AutoConfig.for_model(model_type, **fields, **special))


def section(**settings: Any) -> ModelSection:
    return ModelSection.model_validate({"from": "somewhere", **settings})


@pytest.mark.parametrize("model_type", MODELS)
def test_depth_goes_from_the_embeddings_to_the_head(model_type: str) -> None:
    model = make(model_type)
    depth_of = depths(model)
    by_tensor = {id(parameter): depth_of[name] for name, parameter in model.named_parameters()}
    assert by_tensor[id(model.get_input_embeddings().weight)] == 0
    assert set(depth_of.values()) == {0, 1, 2, 3, 4}
    names = [name for name, depth in depth_of.items() if depth == 2]
    assert names
    assert all(".1." in name for name in names)


@pytest.mark.parametrize("model_type", MODELS)
def test_layer_decay_scales_rates_and_every_parameter_is_in_one_group(model_type: str) -> None:
    model = make(model_type)
    optim = OptimSection(lr=0.1, layer_decay=0.5, weight_decay=0.3)
    made = groups(model, optim)
    members = [id(parameter) for group in made for parameter in group["params"]]
    assert sorted(members) == sorted(id(parameter) for parameter in model.parameters())
    depth_of = {id(parameter): depths(model)[name] for name, parameter in model.named_parameters()}
    for group in made:
        assert group["lr"] == pytest.approx(0.1 * group["lr_scale"])
        for parameter in group["params"]:
            assert group["lr_scale"] == 0.5 ** (4 - depth_of[id(parameter)])
            assert group["weight_decay"] == (0.3 if parameter.dim() > 1 else 0.0)


def test_without_layer_decay_there_are_two_groups() -> None:
    made = groups(make("bert"), OptimSection(lr=0.1))
    assert [(group["lr_scale"], group["weight_decay"]) for group in made] == [(1.0, 0.01), (1.0, 0.0)]


def test_frozen_layers_and_patterns_are_not_trained() -> None:
    model = make("bert")
    freeze(model, section(freeze_layers=2, freeze=["cls.*"]), fresh=())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".layer.2." in name for name in trained)
    assert {id(p) for group in groups(model, OptimSection(lr=0.1)) for p in group["params"]} == {
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    }


def test_the_hash_covers_frozen_parameters_only() -> None:
    model = make("bert")
    assert frozen_sha256(model) == ""
    freeze(model, section(freeze=["bert.embeddings.*"]), fresh=())
    before = frozen_sha256(model)
    with torch.no_grad():
        model.cls.predictions.transform.dense.weight += 1
    assert frozen_sha256(model) == before
    with torch.no_grad():
        model.bert.embeddings.LayerNorm.bias += 1
    assert frozen_sha256(model) != before


@pytest.mark.parametrize(
    ("settings", "fresh", "words"),
    [
        ({"freeze": ["bert.nothing.*"]}, (), r"no parameter matches `bert\.nothing\.\*`"),
        ({"freeze": ["*"]}, (), "every parameter is frozen"),
        ({"freeze_layers": 4}, (), "the model has 3 layers, not 4"),
        ({"freeze": ["cls.*"]}, ("cls.predictions.bias",), r"cls\.predictions\.bias would stay random"),
    ],
)
def test_freezing_that_makes_no_sense_is_refused(settings: Any, fresh: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        freeze(make("bert"), section(**settings), fresh=fresh)


def test_a_model_that_shares_one_layer_has_no_layer_decay() -> None:
    config = AutoConfig.for_model("albert", **SMALL, embedding_size=8)
    with pytest.raises(ConfigError, match="no layers that are numbered"):
        groups(AutoModelForMaskedLM.from_config(config), OptimSection(lr=0.1, layer_decay=0.9))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"freeze_layers": 1}, "need model.from"),
        ({"lora": {"rank": 4}}, "need model.from"),
        ({"from": "x", "lora": {"rank": 4}, "freeze": ["a"]}, "no effect with model.lora"),
        ({"resize_embeddings": True}, "no effect on a new model"),
        ({"config": "c.json", "family": "bert"}, "model.family has no effect beside model.config"),
        ({"config": "c.json", "from": "x"}, "model.config has no effect beside model.from"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelSection.model_validate(values)
