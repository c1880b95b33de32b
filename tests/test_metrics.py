"""One point a step, whatever was run twice; averages over targets, not over averages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dist_lm.metrics import MetricsLog, Window, averages, read_metrics

pytestmark = pytest.mark.fast


class OneRank:
    """The sums of a single rank."""

    world_size = 1
    device = torch.device("cpu")

    def sum(self, values: list[float]) -> list[float]:
        return list(values)


def test_an_average_weighs_targets_and_not_steps() -> None:
    clock = iter([0.0, 2.0, 2.0])
    window = Window(clock=lambda: next(clock))
    window.add({"mlm_loss": torch.tensor(10.0), "mlm_correct": torch.tensor(1)}, {"mlm": 2.0}, tokens=30.0)
    window.add({"mlm_loss": torch.tensor(2.0), "mlm_correct": torch.tensor(6)}, {"mlm": 6.0}, tokens=10.0)
    values = window.reduce(OneRank())  # type: ignore[arg-type]
    assert values["mlm_loss"] == 12.0 / 8.0
    assert values["mlm_accuracy"] == 7.0 / 8.0
    assert values["tokens_per_second"] == 20.0
    assert values["step_seconds"] == 1.0


def test_no_targets_give_zero_and_not_nan() -> None:
    assert averages({"mlm_loss": 0.0, "mlm_correct": 0.0}, {"mlm": 0.0})["loss"] == 0.0


def test_a_resumed_run_leaves_one_point_a_step_in_both_logs(tmp_path: Path) -> None:
    path, board = tmp_path / "metrics.jsonl", tmp_path / "tb"
    first = MetricsLog(path, board, resumed_step=0)
    for step in range(1, 9):
        first.write("train", step, {"loss": float(step)})
    first.close()
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 9, "lo')
    second = MetricsLog(path, board, resumed_step=5)
    for step in range(6, 11):
        second.write("train", step, {"loss": 100.0 + step})
    second.close()
    expected = {step: float(step) if step <= 5 else 100.0 + step for step in range(1, 11)}
    assert {record["step"]: record["loss"] for record in read_metrics(path, "train")} == expected
    shown = EventAccumulator(str(board), purge_orphaned_data=True)
    shown.Reload()
    assert [(event.step, event.value) for event in shown.Scalars("train/loss")] == [*expected.items()]
