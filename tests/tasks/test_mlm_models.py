"""MLM with encoders of many kinds: heads at masked positions, windows of text, sentence order."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm.config import MlmTask, ModelSection
from dist_lm.data.manifest import Manifest
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.views import view_of
from dist_lm.errors import ConfigError, DataError
from dist_lm.tasks.mlm import MaskedLanguageModelling
from tests.loss_equality import assert_loss_is_that_of_transformers, labels_at
from tests.tasks_rows import stream_rows
from tests.token_rows import token_rows, token_view, train_kind

pytestmark = pytest.mark.fast
LENGTH = 46
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "albert": {**SMALL, "embedding_size": 16},
    "electra": {**SMALL, "embedding_size": 16},
    "xlm-roberta": {**SMALL, "type_vocab_size": 1},
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_kind(tmp_path_factory.mktemp("mlm"), "wordpiece")


def window_task(tokenizer: Tokenizer, **settings: Any) -> MaskedLanguageModelling:
    settings = {"pair": "none", **settings}
    return MaskedLanguageModelling(MlmTask(name="mlm", **settings), tokenizer, token_view(tokenizer, LENGTH), seed=7)


def section(folder: Path, model_type: str, fields: dict[str, Any]) -> ModelSection:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": model_type, **fields}))
    return ModelSection(config=path)


def assert_equal_loss(task: MaskedLanguageModelling, model: Any, tokenizer: Tokenizer) -> None:
    batch = task.collate(token_rows(tokenizer, LENGTH, count=4))
    ids = batch.inputs["input_ids"]
    labels = labels_at(tuple(ids.shape), batch.inputs["masked_positions"], batch.inputs["masked_labels"])
    assert_loss_is_that_of_transformers(task, model, batch, input_ids=ids, labels=labels)


def test_a_window_is_packed_and_holds_the_whole_row(tokenizer: Tokenizer) -> None:
    task = window_task(tokenizer, mask_probability=1e-9)
    rows = token_rows(tokenizer, LENGTH)
    batch = task.collate(rows)
    ids = batch.inputs["input_ids"].numpy()
    assert ids.shape == (8, LENGTH + 2)
    assert (ids[:, 0] == tokenizer.cls_id).all()
    assert (ids[:, 1:-1] == rows.columns["tokens"]).all()
    assert (ids[:, -1] == tokenizer.sep_id).all()
    assert "attention_mask" not in batch.inputs
    assert batch.tokens == batch.slots == ids.size


def test_separators_inside_a_window_are_no_targets(tokenizer: Tokenizer) -> None:
    task = window_task(tokenizer, mask_probability=0.9)
    batch = task.collate(token_rows(tokenizer, LENGTH))
    labels = batch.inputs["masked_labels"].numpy()
    assert len(labels) > 200
    assert not np.isin(labels, tokenizer.special_ids).any()


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert"])
def test_families_give_the_loss_of_transformers(tokenizer: Tokenizer, family: Any) -> None:
    task = window_task(tokenizer, mask_unit="span")
    model = task.build_model(ModelSection(family=family, size="tiny"))
    assert task._head is not None
    assert_equal_loss(task, model, tokenizer)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_other_encoders_give_the_loss_of_transformers(tokenizer: Tokenizer, tmp_path: Path, model_type: str) -> None:
    task = window_task(tokenizer)
    model = task.build_model(section(tmp_path, model_type, CONFIGS[model_type]))
    assert task._head is not None
    assert_equal_loss(task, model, tokenizer)


def test_an_unknown_head_is_computed_everywhere_and_the_log_says_so(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = window_task(tokenizer)
    with caplog.at_level(logging.WARNING):
        model = task.build_model(section(tmp_path, "deberta-v2", {**SMALL, "legacy": False}))
    assert task._head is None
    assert "logits are computed at every position" in caplog.text
    assert_equal_loss(task, model, tokenizer)


def test_albert_learns_the_order_of_sentences(topics_data: Path, tmp_path: Path) -> None:
    task = MaskedLanguageModelling(
        MlmTask(name="mlm", pair="sop"),
        load_tokenizer(topics_data / "tokenizer"),
        view_of(Manifest.load(topics_data / "pairs" / "train"), None),
        seed=7,
    )
    model = task.build_model(section(tmp_path, "albert", CONFIGS["albert"]))
    batch = task.collate(stream_rows(topics_data, (), count=16))
    assert batch.targets["sop"] == 16
    seen = {name: batch.inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    labels = labels_at(tuple(seen["input_ids"].shape), batch.inputs["masked_positions"], batch.inputs["masked_labels"])
    order = batch.inputs["pair_labels"]
    assert_loss_is_that_of_transformers(task, model, batch, **seen, labels=labels, sentence_order_label=order)


def test_pairs_need_rows_and_a_model_that_have_them(tokenizer: Tokenizer, topics_data: Path) -> None:
    with pytest.raises(ConfigError, match="rows of kind `tokens` have no pairs"):
        window_task(tokenizer, pair="nsp")
    task = MaskedLanguageModelling(
        MlmTask(name="mlm", pair="sop"),
        load_tokenizer(topics_data / "tokenizer"),
        view_of(Manifest.load(topics_data / "pairs" / "train"), None),
        seed=7,
    )
    with pytest.raises(ConfigError, match="no head that judges pairs"):
        task.build_model(ModelSection(family="roberta", size="tiny"))


def test_a_tokenizer_without_a_mask_is_named(tmp_path: Path) -> None:
    gpt = train_kind(tmp_path, "bpe")
    with pytest.raises(DataError, match="no cls_token, which mlm needs"):
        window_task(gpt)
