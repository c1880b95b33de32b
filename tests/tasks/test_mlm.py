"""Masks and pairs as functions of a row's identity; the sparse head against the full one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_lm.config import MlmTask, ModelSection
from dist_lm.data.manifest import Manifest
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.data.views import view_of
from dist_lm.tasks.masking import span_rates
from dist_lm.tasks.mlm import MaskedLanguageModelling
from tests.loss_equality import assert_loss_is_that_of_transformers, labels_at
from tests.tasks_rows import stream_rows

pytestmark = pytest.mark.fast
PARTNERS = ("second", "second_length", "document")


def make_task(data: Path, **settings: object) -> MaskedLanguageModelling:
    return MaskedLanguageModelling(
        MlmTask(name="mlm", **settings),  # type: ignore[arg-type]
        load_tokenizer(data / "tokenizer"),
        view_of(Manifest.load(data / "pairs" / "train"), None),
        seed=7,
    )


def targets(task: MaskedLanguageModelling, rows: object) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the targets, what they are, and what the model sees there."""
    inputs = task.collate(rows).inputs  # type: ignore[arg-type]
    places = inputs["masked_positions"].numpy()
    return places, inputs["masked_labels"].numpy(), inputs["input_ids"].flatten().numpy()[places]


def test_shares_of_masked_random_and_kept_targets_are_those_of_the_settings(topics_data: Path) -> None:
    task = make_task(topics_data)
    rows = stream_rows(topics_data, PARTNERS, count=1024)
    places, labels, shown = targets(task, rows)
    batch = task.collate(rows)
    special = 3 * len(rows)
    num = len(places)
    # Four standard deviations of a binomial: wrong once in 15 000 seeds, and the seed is fixed.
    assert abs(num - 0.15 * (batch.tokens - special)) < 4 * (0.15 * 0.85 * batch.tokens) ** 0.5
    masked, kept = (shown == task.tokenizer.mask_id).sum(), (shown == labels).sum()
    assert abs(masked - 0.8 * num) < 4 * (0.16 * num) ** 0.5
    assert abs(kept - 0.1 * num) < 4 * (0.09 * num) ** 0.5 + num / 900
    special_ids = {task.tokenizer.cls_id, task.tokenizer.sep_id, task.tokenizer.pad_id}
    assert not special_ids & set(labels.tolist())


def test_a_row_is_masked_alike_in_any_company_and_anew_in_each_epoch(topics_data: Path) -> None:
    task = make_task(topics_data)
    rows = stream_rows(topics_data, PARTNERS)
    whole = task.collate(rows)
    backwards = task.collate(rows.take(np.arange(len(rows))[::-1].copy()))
    assert torch.equal(whole.inputs["input_ids"], backwards.inputs["input_ids"].flip(0))
    later = task.collate(replace(rows, epoch=rows.epoch + 1))
    assert not torch.equal(whole.inputs["masked_positions"], later.inputs["masked_positions"])


def test_ranks_together_see_the_targets_of_the_whole_batch(topics_data: Path) -> None:
    task = make_task(topics_data)
    whole = task.collate(stream_rows(topics_data, PARTNERS))
    parts = [task.collate(stream_rows(topics_data, PARTNERS, rank=rank, world_size=3)) for rank in range(3)]
    for name in ("mlm", "nsp"):
        assert sum(part.targets[name] for part in parts) == whole.targets[name]
    labels = sorted(torch.cat([part.inputs["masked_labels"] for part in parts]).tolist())
    assert labels == sorted(whole.inputs["masked_labels"].tolist())


def test_words_are_masked_whole(topics_data: Path) -> None:
    task = make_task(topics_data, mask_unit="word", pair="none")
    rows = stream_rows(topics_data, (), count=256)
    clean = make_task(topics_data, mask_probability=1e-9, pair="none").collate(rows).inputs["input_ids"]
    masked = np.zeros(clean.shape, dtype=bool)
    masked.reshape(-1)[targets(task, rows)[0]] = True
    continuation = task.tokenizer.continuation[clean.numpy()]
    begun_before = np.roll(masked, 1, axis=1)
    # A segment that was cut inside a word begins with a continuation: it stands for itself.
    after_special = np.isin(np.roll(clean.numpy(), 1, axis=1), [task.tokenizer.cls_id, task.tokenizer.sep_id])
    continuation &= ~after_special
    assert continuation.sum() > 100
    assert (masked[continuation] == begun_before[continuation]).all()


def test_half_of_the_pairs_are_false_and_labelled_so(topics_data: Path) -> None:
    task = make_task(topics_data)
    rows = stream_rows(topics_data, PARTNERS, count=1024)
    batch = task.collate(rows)
    labels = batch.inputs["pair_labels"].numpy()
    judged = batch.inputs["pair_rows"].numpy()
    assert 0.4 < labels.mean() < 0.55
    segments = task._segments(rows)
    swapped, second = segments.label_B, segments.parts[1][0]
    assert (labels == swapped[judged]).all()
    assert (second[~swapped] == rows.columns["second"][~swapped]).all()
    other = rows.columns["partner_document"][swapped] != rows.columns["document"][swapped]
    assert other.all()


def test_filler_rows_are_no_targets(topics_data: Path) -> None:
    task = make_task(topics_data)
    rows = stream_rows(topics_data, PARTNERS)
    batch = task.collate(rows.as_fillers())
    assert batch.targets == {"mlm": 0, "nsp": 0}
    assert batch.tokens == 0


def test_half_of_the_pairs_are_turned_round_and_labelled_so(topics_data: Path) -> None:
    task = make_task(topics_data, pair="sop", mask_probability=1e-9)
    rows = stream_rows(topics_data, (), count=256)
    plain = make_task(topics_data, pair="none", mask_probability=1e-9).collate(rows).inputs["input_ids"].numpy()
    batch = task.collate(rows)
    seen = batch.inputs["input_ids"].numpy()
    turned = np.zeros(len(rows), dtype=bool)
    turned[batch.inputs["pair_rows"]] = batch.inputs["pair_labels"].numpy() == 1
    assert 0.4 < turned.mean() < 0.6
    assert (seen[~turned] == plain[~turned]).all()
    assert (np.sort(seen[turned]) == np.sort(plain[turned])).all()
    (row,) = np.flatnonzero(turned)[:1]
    second = rows.columns["second"][row, : rows.columns["second_length"][row]]
    assert (seen[row, 1 : 1 + len(second)] == second).all()
    assert batch.targets["sop"] == (rows.columns["second_length"] > 0).sum()


@pytest.mark.parametrize(("probability", "mean"), [(0.15, 3.8), (0.15, 1.0), (0.4, 2.0)])
def test_spans_cover_the_share_asked_for_with_the_mean_length_asked_for(
    topics_data: Path, probability: float, mean: float
) -> None:
    task = make_task(topics_data, mask_unit="span", pair="none", mask_probability=probability, mean_span=mean)
    rows = stream_rows(topics_data, (), count=1024)
    batch = task.collate(rows)
    maskable = batch.tokens - 3 * len(rows) + int((rows.columns["second_length"] == 0).sum())
    num = batch.targets["mlm"]
    # Tokens of a span go together, so the spread is that of spans of up to ten tokens.
    assert abs(num - probability * maskable) < 4 * (10 * probability * maskable) ** 0.5
    start, stop = span_rates(probability, mean)
    reach = (1.0 - stop) ** np.arange(10)
    assert reach.sum() == pytest.approx(mean)
    assert 1.0 - np.prod(1.0 - start * reach) == pytest.approx(probability)
    masked = np.zeros(batch.inputs["input_ids"].shape, dtype=bool)
    masked.reshape(-1)[batch.inputs["masked_positions"]] = True
    runs = (masked & ~np.roll(masked, 1, axis=1)).sum()
    # A run begins where a span begins behind an uncovered token; special tokens part some runs.
    assert num / runs == pytest.approx(probability / ((1.0 - probability) * start), rel=0.1)


def test_a_span_is_shown_in_one_way(topics_data: Path) -> None:
    task = make_task(topics_data, mask_unit="span", pair="none", mask_share=0.5, random_share=0.0)
    rows = stream_rows(topics_data, (), count=512)
    places, _, shown = targets(task, rows)
    neighbours = np.flatnonzero(np.diff(places) == 1)
    hidden = shown == task.tokenizer.mask_id
    assert 0.4 < hidden.mean() < 0.6
    assert (hidden[neighbours] == hidden[neighbours + 1]).mean() > 0.85


def test_a_head_at_masked_positions_gives_the_loss_of_transformers(topics_data: Path) -> None:
    task = make_task(topics_data)
    batch = task.collate(stream_rows(topics_data, PARTNERS, count=16))
    # Every row of these has a pair, so that the mean over pairs is the model's own.
    assert batch.targets["nsp"] == 16
    model = task.build_model(ModelSection(size="tiny"))
    seen = {name: batch.inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    labels = labels_at(tuple(seen["input_ids"].shape), batch.inputs["masked_positions"], batch.inputs["masked_labels"])
    pairs = batch.inputs["pair_labels"]
    assert_loss_is_that_of_transformers(task, model, batch, **seen, labels=labels, next_sentence_label=pairs)
