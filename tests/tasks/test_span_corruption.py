"""Noise as a function of a row's identity: its density, its lengths, and that nothing is lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_lm.config import ModelSection, SpanCorruptionTask
from dist_lm.data.order import keyed_hash
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError, DataError
from dist_lm.tasks.span_corruption import SpanCorruption
from dist_lm.tasks.spans import noise_counts, noise_mask, prefix_lengths, replace_spans
from tests.loss_equality import assert_loss_is_that_of_transformers
from tests.token_rows import token_rows, token_view, train_kind

pytestmark = pytest.mark.fast
LENGTH = 64
BART = {
    "model_type": "bart",
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "decoder_start_token_id": 0,
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_kind(tmp_path_factory.mktemp("t5"), "t5")


def make_task(tokenizer: Tokenizer, seq_len: int = LENGTH, **options: Any) -> SpanCorruption:
    return SpanCorruption(
        SpanCorruptionTask(name="span_corruption", **options), tokenizer, token_view(tokenizer, seq_len), seed=7
    )


@given(
    length=st.integers(2, 600),
    density=st.floats(0.01, 0.99),
    mean_span=st.floats(1.0, 20.0),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_noise_has_the_density_and_the_mean_length_asked_for(
    length: int, density: float, mean_span: float, seed: int
) -> None:
    keys = keyed_hash(seed, np.arange(5, dtype=np.uint64))
    mask = noise_mask(keys, length, density=density, mean_span=mean_span)
    noise, spans = noise_counts(length, density=density, mean_span=mean_span)
    assert (mask.sum(axis=1) == noise).all()
    assert abs(noise - length * density) <= 1
    begins = mask & ~np.concatenate([np.zeros((5, 1), dtype=bool), mask[:, :-1]], axis=1)
    assert (begins.sum(axis=1) == spans).all()
    assert not mask[:, 0].any()
    assert mask[:, -1].all()
    # As near to the mean as a whole number of spans allows, where the row has room for them.
    if spans < min(noise, length - noise):
        assert noise / (spans + 0.5) <= mean_span <= noise / max(spans - 0.5, 1e-9) or spans == 1


@given(length=st.integers(2, 200), density=st.floats(0.05, 0.9), mean_span=st.floats(1.0, 9.0))
@settings(max_examples=100, deadline=None)
def test_input_and_target_together_hold_the_row(length: int, density: float, mean_span: float) -> None:
    ids = np.arange(4 * length).reshape(4, length)
    sentinels = -1 - np.arange(length)
    mask = noise_mask(keyed_hash(3, np.arange(4)), length, density=density, mean_span=mean_span)
    shown, written = replace_spans(ids, mask, sentinels), replace_spans(ids, ~mask, sentinels)
    for row in range(4):
        assert rebuilt(shown[row].tolist(), written[row].tolist()) == ids[row].tolist()


def rebuilt(shown: list[int], written: list[int]) -> list[int]:
    """The row, read as a decoder would fill it in: negative numbers are sentinels."""
    stretches: dict[int, list[int]] = {}
    for token in written:
        if token < 0:
            stretches[token] = []
            current = stretches[token]
        else:
            current.append(token)
    return [piece for token in shown for piece in (stretches[token] if token < 0 else [token])]


def test_spans_are_new_in_each_epoch_and_the_same_in_any_company(tokenizer: Tokenizer) -> None:
    task = make_task(tokenizer)
    rows = token_rows(tokenizer, LENGTH)
    whole = task.collate(rows).inputs
    backwards = task.collate(rows.take(np.arange(len(rows))[::-1].copy())).inputs
    for name in ("input_ids", "labels"):
        assert torch.equal(whole[name], backwards[name].flip(0))
    later = task.collate(replace(rows, epoch=rows.epoch + 1)).inputs
    assert not torch.equal(whole["input_ids"], later["input_ids"])


def test_a_batch_is_as_the_papers_example(tokenizer: Tokenizer) -> None:
    task = make_task(tokenizer)
    rows = token_rows(tokenizer, LENGTH)
    batch = task.collate(rows)
    shown, labels = batch.inputs["input_ids"].numpy(), batch.inputs["labels"].numpy()
    # 15 % of 64 tokens are 10, in 3 spans.
    assert shown.shape == (8, 64 - 10 + 3 + 1)
    assert labels.shape == (8, 10 + 3 + 1)
    assert (labels[:, 0] == tokenizer.sentinels[0]).all()
    assert (shown[:, -1] == tokenizer.eos_id).all()
    assert (labels[:, -1] == tokenizer.eos_id).all()
    negative = {number: -1 - place for place, number in enumerate(tokenizer.sentinels)}
    for row in range(8):
        pieces = [[negative.get(token, token) for token in side[row, :-1].tolist()] for side in (shown, labels)]
        assert rebuilt(*pieces) == rows.columns["tokens"][row].tolist()
    assert batch.targets == {"span": labels.size}
    assert "attention_mask" not in batch.inputs


def test_a_prefix_and_its_continuation_are_the_row(tokenizer: Tokenizer) -> None:
    task = make_task(tokenizer, objective="prefix")
    rows = token_rows(tokenizer, LENGTH)
    batch = task.collate(rows)
    shown, labels = batch.inputs["input_ids"].numpy(), batch.inputs["labels"].numpy()
    seen = batch.inputs["attention_mask"].numpy().astype(bool)
    lengths = set()
    for row in range(8):
        first, rest = shown[row][seen[row]], labels[row][labels[row] != -100]
        assert first[-1] == rest[-1] == tokenizer.eos_id
        assert [*first[:-1], *rest[:-1]] == rows.columns["tokens"][row].tolist()
        lengths.add(len(first))
    assert len(lengths) > 4
    assert batch.tokens == 8 * (LENGTH + 2)
    many = prefix_lengths(keyed_hash(1, np.arange(6300)), LENGTH)
    counts = np.bincount(many, minlength=LENGTH)
    assert counts[0] == 0
    assert len(counts) == LENGTH
    assert (abs(counts[1:] - 100) < 50).all()


def test_filler_rows_are_no_targets(tokenizer: Tokenizer) -> None:
    for objective in ("span", "prefix"):
        batch = make_task(tokenizer, objective=objective).collate(token_rows(tokenizer, LENGTH).as_fillers())
        assert batch.targets == {"span": 0}
        assert batch.tokens == 0


@pytest.mark.parametrize("objective", ["span", "prefix"])
@pytest.mark.parametrize("model", ["tiny", "gated", "bart"])
def test_loss_and_gradients_are_those_of_transformers(
    tokenizer: Tokenizer, tmp_path: Path, objective: str, model: str
) -> None:
    if model == "bart":
        (tmp_path / "config.json").write_text(json.dumps(BART))
        section = ModelSection(config=tmp_path / "config.json")
    else:
        shape: dict[str, Any] = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
        section = ModelSection(size="tiny" if model == "tiny" else "small", overrides=shape)
    task = make_task(tokenizer, objective=objective, head_chunk=30)
    built = task.build_model(section)
    assert task._head is not None
    batch = task.collate(token_rows(tokenizer, LENGTH, count=4))
    seen = {name: batch.inputs[name] for name in ("input_ids", "attention_mask", "labels") if name in batch.inputs}
    assert_loss_is_that_of_transformers(task, built, batch, **seen)


def test_too_few_sentinels_are_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="150 noise spans, the tokenizer 100 sentinels"):
        make_task(tokenizer, seq_len=3000)
    make_task(tokenizer, seq_len=3000, objective="prefix")


def test_a_tokenizer_without_sentinels_is_named(tmp_path: Path) -> None:
    gpt = train_kind(tmp_path, "bpe")
    with pytest.raises(DataError, match="no <extra_id_0>, which span_corruption needs"):
        make_task(gpt)


def test_a_model_that_does_not_tell_its_shift_is_refused(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**BART, "model_type": "blenderbot"}))
    with pytest.raises(ConfigError, match="BlenderbotForConditionalGeneration does not tell how it shifts targets"):
        make_task(tokenizer).build_model(ModelSection(config=tmp_path / "config.json"))
