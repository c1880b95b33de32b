"""Adapters in a model: what is trained, merged and saved equals what was trained; what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from dist_lm import lora
from dist_lm import model as models
from dist_lm.config import LoraSection, ModelSection
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError, EnvironmentFault
from tests.token_rows import train_kind

pytestmark = pytest.mark.fast
IDS = torch.arange(5, 25)[None]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_kind(tmp_path_factory.mktemp("lora"), "wordpiece")


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base") / "bert"
    models.build(
        ModelSection(size="tiny"), tokenizer, AutoModelForMaskedLM, family="bert", positions=64, seed=1
    ).save_pretrained(path)
    return path


def classifier(folder: Path, tokenizer: Tokenizer, **settings: Any) -> Any:
    section = ModelSection.model_validate({"from": str(folder), "lora": {"rank": 4, **settings}})
    return models.build(
        section, tokenizer, AutoModelForSequenceClassification, family="bert", positions=64, seed=1, num_labels=3
    ).eval()


def disturb(model: Any) -> None:
    """As training would: all trained parameters move, so that adapters count."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)


def trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_adapters_and_the_new_head_are_trained_and_nothing_else(folder: Path, tokenizer: Tokenizer) -> None:
    names = trained(classifier(folder, tokenizer))
    head = {name for name in names if ".lora_" not in name}
    assert head == {"bert.pooler.dense.weight", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    # Six linear layers in each of two layers, two matrices each.
    assert len(names - head) == 2 * 6 * 2


def test_targets_and_further_modules_are_chosen_by_the_last_part_of_their_names(
    folder: Path, tokenizer: Tokenizer
) -> None:
    names = trained(classifier(folder, tokenizer, targets=["query"], train_too=["embeddings"]))
    adapted = {name for name in names if ".lora_" in name}
    assert len(adapted) == 2 * 2
    assert all(".query." in name for name in adapted)
    assert "bert.embeddings.word_embeddings.weight" in names


def test_new_adapters_change_nothing_and_merged_ones_give_the_same_logits(folder: Path, tokenizer: Tokenizer) -> None:
    model = classifier(folder, tokenizer)
    fresh = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    with torch.no_grad():
        assert torch.equal(model.bert(IDS).last_hidden_state, fresh.bert(IDS).last_hidden_state)
        disturb(model)
        expected = model(IDS).logits
        lora.merge(model)
        assert torch.allclose(model(IDS).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model.bert(IDS).last_hidden_state, fresh.bert(IDS).last_hidden_state, atol=1e-3)
    assert set(model.state_dict()) == set(fresh.state_dict())


def test_a_saved_adapter_with_its_head_loads_with_peft(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = classifier(folder, tokenizer)
    disturb(model)
    lora.save_adapter(model, LoraSection(rank=4), tmp_path, base=folder)
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"targets": ["q_proj"]}, "has no module q_proj"), ({"train_too": ["lm_head"]}, "has no module lm_head")],
)
def test_names_that_match_nothing_are_refused(
    folder: Path, tokenizer: Tokenizer, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        classifier(folder, tokenizer, **settings)
    assert "query" in str(caught.value)


def test_without_peft_it_is_named(folder: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(EnvironmentFault, match="LoRA needs the package peft"):
        classifier(folder, tokenizer)
