"""Targets, isolated documents, and the loss of transformers' own models."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dist_lm.config import CausalLmTask, ModelSection
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError, DataError
from dist_lm.tasks.causal_lm import CausalLanguageModelling
from tests.loss_equality import assert_loss_is_that_of_transformers, labels_at
from tests.token_rows import token_rows, token_view, train_kind

pytestmark = pytest.mark.fast
LENGTH = 64
BLOOM = {"model_type": "bloom", "hidden_size": 32, "n_layer": 1, "n_head": 2}
GEMMA = {
    "model_type": "gemma2",
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "intermediate_size": 64,
    "final_logit_softcapping": 0.05,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_kind(tmp_path_factory.mktemp("causal"), "bpe")


def make_task(tokenizer: Tokenizer, **settings: Any) -> CausalLanguageModelling:
    return CausalLanguageModelling(
        CausalLmTask(name="causal_lm", **settings), tokenizer, token_view(tokenizer, LENGTH), seed=7
    )


def section(family: Any) -> ModelSection:
    return ModelSection(family=family, size="tiny")


def from_config(folder: Path, config: dict[str, Any]) -> ModelSection:
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return ModelSection(config=path)


def test_a_separator_is_a_target_and_what_follows_it_is_none(tokenizer: Tokenizer) -> None:
    task = make_task(tokenizer)
    rows = token_rows(tokenizer, LENGTH)
    ids = rows.columns["tokens"].astype(np.int64)
    batch = task.collate(rows)
    labels = labels_at(ids.shape, batch.inputs["target_places"], batch.inputs["target_labels"]).numpy()
    separators = ids == tokenizer.separator_id
    assert separators.sum() > 8
    assert (labels[separators] == -100).all()
    inner = separators[:, 1:] & ~separators[:, :-1]
    assert (labels[:, :-1][inner] == tokenizer.separator_id).all()
    others = ~separators[:, :-1]
    assert (labels[:, :-1][others] == ids[:, 1:][others]).all()
    assert (labels[:, -1] == -100).all()
    positions = batch.inputs["position_ids"].numpy()
    after = np.roll(separators, 1, axis=1)
    after[:, 0] = True
    assert (positions[after] == 0).all()
    assert (np.diff(positions, axis=1)[~after[:, 1:]] == 1).all()


def test_filler_rows_are_no_targets(tokenizer: Tokenizer) -> None:
    batch = make_task(tokenizer).collate(token_rows(tokenizer, LENGTH).as_fillers())
    assert batch.targets == {"lm": 0}
    assert batch.tokens == 0


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_another_document_changes_no_logit(tokenizer: Tokenizer, family: str, attention: Any) -> None:
    task = make_task(tokenizer, documents="isolated")
    model = task.build_model(ModelSection(family=family, size="tiny", attention=attention)).eval()
    rows = token_rows(tokenizer, LENGTH, count=1)
    (cut,) = np.flatnonzero(rows.columns["tokens"][0] == tokenizer.separator_id)[:1]
    changed = {"tokens": rows.columns["tokens"].copy()}
    changed["tokens"][0, :cut] = rows.columns["tokens"][0, :cut][::-1]
    other = Rows(changed, rows.sample_id, rows.epoch, rows.real)

    def logits(rows: Rows, names: tuple[str, ...]) -> torch.Tensor:
        inputs = task.collate(rows).inputs
        with torch.no_grad():
            found: torch.Tensor = model(**{name: inputs[name] for name in names}, use_cache=False).logits[0]
        return found

    apart = ("input_ids", "position_ids")
    same, moved = logits(rows, apart), logits(other, apart)
    assert torch.equal(same[cut + 1 :], moved[cut + 1 :])
    assert not torch.allclose(same[:cut], moved[:cut])
    # Joined, it would: the equality above is not empty.
    assert not torch.allclose(logits(rows, apart[:1])[cut + 1 :], logits(other, apart[:1])[cut + 1 :])


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("documents", ["isolated", "joined"])
@pytest.mark.parametrize("head_chunk", [10_000, 50])
def test_loss_and_gradients_are_those_of_transformers(
    tokenizer: Tokenizer, family: str, documents: str, head_chunk: int
) -> None:
    task = make_task(tokenizer, documents=documents, head_chunk=head_chunk)
    model = task.build_model(section(family))
    batch = task.collate(token_rows(tokenizer, LENGTH))
    seen = {name: batch.inputs[name] for name in ("input_ids", "position_ids") if name in batch.inputs}
    assert ("position_ids" in seen) == (documents == "isolated")
    labels = labels_at(tuple(seen["input_ids"].shape), batch.inputs["target_places"] + 1, batch.inputs["target_labels"])
    if documents == "joined":
        assert (labels[:, 1:] == seen["input_ids"][:, 1:]).all()
    assert_loss_is_that_of_transformers(task, model, batch, **seen, labels=labels, use_cache=torch.tensor(False))


def test_a_head_that_caps_its_logits_is_noticed(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(tokenizer)
    with caplog.at_level(logging.WARNING):
        model = task.build_model(from_config(tmp_path, GEMMA))
    assert "logits are computed at every position" in caplog.text
    batch = task.collate(token_rows(tokenizer, LENGTH, count=2))
    seen = {name: batch.inputs[name] for name in ("input_ids", "position_ids")}
    labels = labels_at((2, LENGTH), batch.inputs["target_places"] + 1, batch.inputs["target_labels"])
    assert_loss_is_that_of_transformers(task, model, batch, **seen, labels=labels, use_cache=torch.tensor(False))


def test_a_model_that_cannot_keep_documents_apart_joins_them_and_says_so(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(tokenizer)
    with caplog.at_level(logging.WARNING):
        task.build_model(from_config(tmp_path, BLOOM))
    assert "documents of a row are joined" in caplog.text
    rows = token_rows(tokenizer, LENGTH, count=2)
    batch = task.collate(rows)
    assert "position_ids" not in batch.inputs
    assert batch.targets == {"lm": 2 * (LENGTH - 1)}
    with pytest.raises(ConfigError, match="cannot keep the documents of a row apart"):
        make_task(tokenizer, documents="isolated").build_model(from_config(tmp_path, BLOOM))


def test_smoothing_is_for_training_only(tokenizer: Tokenizer) -> None:
    task = make_task(tokenizer, label_smoothing=0.2, head_chunk=40)
    model = task.build_model(ModelSection(size="tiny", overrides={"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0}))
    batch = task.collate(token_rows(tokenizer, LENGTH, count=2))
    seen = {name: batch.inputs[name] for name in ("input_ids", "position_ids")}
    logits = model(**seen, use_cache=False).logits.flatten(0, 1)[batch.inputs["target_places"]]
    for mode, smoothing in ((True, 0.2), (False, 0.0)):
        model.train(mode)
        expected = F.cross_entropy(logits, batch.inputs["target_labels"], reduction="sum", label_smoothing=smoothing)
        assert task.loss_sums(model, batch.inputs)["lm_loss"].item() == pytest.approx(expected.item(), rel=1e-6)


def test_rows_longer_than_the_positions_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="model inputs of 64 tokens do not fit a model with 32 positions"):
        make_task(tokenizer).build_model(ModelSection(size="tiny", overrides={"n_positions": 32}))
