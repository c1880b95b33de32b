"""Loss and gradients of a task beside those of transformers' own model loss on the same batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dist_lm.tasks.base import MicroBatch, Task


def assert_loss_is_that_of_transformers(task: Task, model: Any, batch: MicroBatch, **arguments: Tensor) -> None:
    """`arguments`: what the model's own forward pass takes, labels and all.  fp32, 1e-6 relative."""
    model.eval()
    sums = task.loss_sums(model, batch.inputs)
    ours = sum(sums[f"{name}_loss"] / batch.targets[name] for name in task.objectives)
    ours.backward()  # type: ignore[union-attr]
    gradients = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-6)  # type: ignore[union-attr]
    with_gradient = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert set(gradients) == set(with_gradient)
    for name, gradient in with_gradient.items():
        difference = (gradients[name] - gradient).norm()
        assert difference <= 1e-6 * gradient.norm() + 1e-8, (name, float(difference), float(gradient.norm()))


def labels_at(shape: tuple[int, ...], places: Tensor, labels: Tensor) -> Tensor:
    """Labels of a whole batch: those of the targets, -100 elsewhere."""
    whole = torch.full(shape, -100)
    whole.view(-1)[places] = labels
    return whole
