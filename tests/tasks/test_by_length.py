"""Rows of like length share micro-batches: less padding, and the same sums."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from dist_lm.config import ClassificationTask
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.schedule import BatchPlan
from dist_lm.tasks.base import in_order
from dist_lm.tasks.classification import Classification
from tests.tasks.prepared_rows import view_and_rows
from tests.tasks.test_fine_tuning_losses import TINY

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def task_and_rows(topics_data: Path) -> tuple[Classification, Rows]:
    tokenizer = load_tokenizer(topics_data / "tokenizer")
    words = topics["assert"].split()
    records = [
        {"text": " ".join(words[number : number + 1 + 7 * number % 50]), "label": str(number % 2)}
        for number in range(62)
    ]
    view, rows = view_and_rows("classification", records, tokenizer, seq_len=96)
    return Classification(ClassificationTask(name="classification"), tokenizer, view, seed=1), rows.padded(64)


def test_padding_shrinks_and_the_sums_stay(task_and_rows: tuple[Classification, Rows]) -> None:
    task, rows = task_and_rows
    model = task.build_model(TINY).eval()
    plan = BatchPlan.divide(64, 8, 1)
    slots, losses = [], []
    for batch in (rows, task.by_length(rows)):
        parts = [task.collate(part) for part in in_order(batch, plan)]
        slots.append(sum(part.slots for part in parts))
        losses.append(sum(task.loss_sums(model, part.inputs)["label_loss"].item() for part in parts))
        assert sum(part.targets["label"] for part in parts) == 62
    assert slots[1] < 0.75 * slots[0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_the_order_is_a_function_of_the_batch(task_and_rows: tuple[Classification, Rows]) -> None:
    task, rows = task_and_rows
    ordered = task.by_length(rows)
    assert (np.diff(ordered.columns["length"].astype(int)) >= 0).all()
    assert sorted(ordered.sample_id) == sorted(rows.sample_id)
    assert (task.by_length(rows).sample_id == ordered.sample_id).all()
    # Rows of one length keep their order: nothing is left to chance.
    again = task.by_length(ordered)
    assert (again.sample_id == ordered.sample_id).all()
