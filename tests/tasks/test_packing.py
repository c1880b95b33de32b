"""Samples that share rows: nothing changes but the padding."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.config import MlmTask, ModelSection
from dist_lm.data.manifest import Manifest
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.data.views import view_of
from dist_lm.errors import ConfigError
from dist_lm.schedule import BatchPlan
from dist_lm.tasks.mlm import MaskedLanguageModelling
from dist_lm.tasks.packing import lay_out
from tests.tasks.test_mlm_models import CONFIGS, LENGTH, SMALL, section
from tests.tasks_rows import stream_rows
from tests.token_rows import token_view

pytestmark = pytest.mark.fast
PARTNERS = ("second", "second_length", "document")
TINY = {"size": "tiny", "overrides": {"num_hidden_layers": 2}}
FAMILIES: dict[str, dict[str, Any]] = {
    "roberta": {**SMALL, "type_vocab_size": 1},
    **{name: CONFIGS[name] for name in ("distilbert", "electra")},
}
# Windows over neighbours; a convolution over neighbours; no mask at all.
CANNOT = {"modernbert": SMALL, "convbert": {**SMALL, "embedding_size": 16}, "fnet": SMALL}


def make_task(data: Path, **settings: Any) -> MaskedLanguageModelling:
    view = view_of(Manifest.load(data / "pairs" / "train"), None)
    return MaskedLanguageModelling(MlmTask(name="mlm", **settings), load_tokenizer(data / "tokenizer"), view, seed=7)


def short_rows(data: Path, count: int = 16) -> Rows:
    """Rows of which some are short, as those at the ends of documents are."""
    rows = stream_rows(data, PARTNERS, count=count)
    for name in ("first_length", "second_length", "partner_second_length"):
        shorter = 1 + np.arange(count) * 7 % 40
        rows.columns[name][:] = np.minimum(rows.columns[name], shorter)
    return rows


def sums_and_gradients(task: MaskedLanguageModelling, model: Any, parts: list[Rows]) -> tuple[dict, dict]:  # type: ignore[type-arg]
    model.zero_grad()
    sums: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, value in task.loss_sums(model, task.collate(part).inputs).items():
            sums[name] = sums.get(name, 0.0) + value
    loss: Any = sum(value for name, value in sums.items() if name.endswith("_loss"))
    loss.backward()
    gradients = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return {name: value.item() for name, value in sums.items()}, gradients


def assert_equal(packed: tuple[dict, dict], padded: tuple[dict, dict]) -> None:  # type: ignore[type-arg]
    assert packed[0] == pytest.approx(padded[0], rel=1e-5)
    assert set(packed[1]) == set(padded[1])
    for name, gradient in padded[1].items():
        difference = (packed[1][name] - gradient).norm()
        assert difference <= 1e-5 * gradient.norm() + 1e-7, (name, float(difference), float(gradient.norm()))


@given(st.lists(st.integers(1, 96), min_size=1, max_size=60), st.integers(96, 128), st.sampled_from([256, 768]))
def test_each_token_stands_once_and_no_row_is_over_the_limit(lengths: list[int], limit: int, hidden: int) -> None:
    lengths_S = np.array(lengths)
    layout = lay_out(lengths_S, limit=limit)
    assert layout.width <= limit
    row_S, column_S = np.divmod(layout.begin_S, layout.width)
    assert (column_S + lengths_S <= layout.width).all()
    assert set(row_S) == set(range(layout.num_rows))
    longest = int(lengths_S.max())
    held = np.arange(longest) < lengths_S[:, None]
    places = layout.places_ST(longest)[held]
    assert len(np.unique(places)) == len(places) == lengths_S.sum()
    padded = min(-(-longest // 8) * 8, limit)
    cost = layout.num_rows * layout.width * (6 * hidden + layout.width)
    assert cost <= len(lengths) * padded * (6 * hidden + padded)
    ids_ST = 10 + np.arange(held.size).reshape(held.shape)
    inputs = layout.inputs(ids_ST, ids_ST % 2, lengths_S, pad_id=3)
    again = inputs["input_ids"].flatten().numpy()
    assert (again[places] == ids_ST[held]).all()
    assert (np.delete(again, places) == 3).all()
    assert (inputs["sample_numbers"].flatten().numpy()[places] == np.nonzero(held)[0] + 1).all()
    assert (inputs["position_ids"].flatten().numpy()[places] == np.nonzero(held)[1]).all()


@pytest.mark.parametrize(
    ("pair", "family", "attention"), [("nsp", "bert", "sdpa"), ("nsp", "bert", "eager"), ("sop", "albert", "sdpa")]
)
def test_packed_samples_give_the_losses_and_gradients_of_padded_ones(
    topics_data: Path, tmp_path: Path, pair: str, family: str, attention: str
) -> None:
    own = section(tmp_path, family, {**SMALL, **CONFIGS.get(family, {})}).model_copy(update={"attention": attention})
    task, padded = make_task(topics_data, pair=pair), make_task(topics_data, pair=pair, packing=False)
    model = task.build_model(own).eval()
    padded.prepare_for(model)
    rows = short_rows(topics_data)
    one, other = task.collate(rows), padded.collate(rows)
    assert one.slots < 0.8 * other.slots
    assert (one.tokens, one.targets) == (other.tokens, other.targets)
    assert len(one.inputs["pair_places"]) == 16
    whole = sums_and_gradients(padded, model, [rows])
    assert_equal(sums_and_gradients(task, model, [rows]), whole)
    # Divided, and with rows of weight zero.
    plan = BatchPlan.divide(18, 5, 1)
    parts = task.divide(rows.padded(18), plan)
    assert [part.real.any() for part in parts] == [True] * 4
    assert sorted(np.concatenate([part.sample_id[part.real] for part in parts])) == sorted(rows.sample_id)
    assert all(len(task.collate(part).inputs["input_ids"]) <= plan.rows_per_micro for part in parts)
    assert_equal(sums_and_gradients(task, model, parts), whole)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_other_encoders_give_equal_losses_too(topics_data: Path, tmp_path: Path, model_type: str) -> None:
    task, padded = make_task(topics_data, pair="none", packing=True), make_task(topics_data, pair="none", packing=False)
    model = task.build_model(section(tmp_path, model_type, FAMILIES[model_type])).eval()
    padded.prepare_for(model)
    rows = short_rows(topics_data)
    assert task.collate(rows).slots < padded.collate(rows).slots
    assert_equal(sums_and_gradients(task, model, [rows]), sums_and_gradients(padded, model, [rows]))


@pytest.mark.parametrize("model_type", CANNOT)
def test_a_model_that_cannot_is_padded_and_the_log_says_so(
    topics_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, model_type: str
) -> None:
    own = section(tmp_path, model_type, CANNOT[model_type])
    task = make_task(topics_data, pair="none")
    with caplog.at_level(logging.INFO):
        task.build_model(own)
    assert "samples are padded" in caplog.text
    assert "sample_numbers" not in task.collate(short_rows(topics_data)).inputs
    with pytest.raises(ConfigError, match="cannot keep the samples of a row apart"):
        make_task(topics_data, pair="none", packing=True).build_model(own)


def test_full_rows_and_rows_of_nobody_are_as_they_were(topics_data: Path) -> None:
    task, padded = make_task(topics_data), make_task(topics_data, packing=False)
    task.build_model(ModelSection(**TINY))
    rows = stream_rows(topics_data, PARTNERS, count=16)
    full = rows.take(np.flatnonzero(task.row_lengths(rows) == task.row_lengths(rows).max())[:2])
    one, other = task.collate(full), padded.collate(full)
    assert one.slots == other.slots
    assert set(one.inputs) - {"pair_places"} == set(other.inputs) - {"pair_rows"}
    fillers = task.collate(rows.as_fillers())
    assert fillers.targets == {"mlm": 0, "nsp": 0}
    assert fillers.tokens == 0
    assert len(fillers.inputs["input_ids"]) == 1


def test_rows_that_are_full_have_nothing_to_save(topics_data: Path) -> None:
    tokenizer = load_tokenizer(topics_data / "tokenizer")
    settings = MlmTask(name="mlm", pair="none", packing=True)
    with pytest.raises(ConfigError, match="rows of kind `tokens` are full"):
        MaskedLanguageModelling(settings, tokenizer, token_view(tokenizer, LENGTH), seed=7)
