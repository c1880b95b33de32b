"""What a task is: rows to features, features to a micro-batch, a micro-batch to loss sums.

Enters: Rows from data/stream.py.  Leaves: sums over targets, never means.
Promises: features are a pure function of the rows' identity; a row of weight zero adds nothing.

Shapes: B rows, T tokens per row, M masked tokens of the micro-batch, H hidden size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from dist_lm import activations
from dist_lm.config import ModelSection
from dist_lm.data.rows import Rows
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.data.views import View
from dist_lm.errors import DataError
from dist_lm.schedule import BatchPlan
from dist_lm.scores.base import MetricState

LENGTH_MULTIPLE = 8
"""Rows are padded to a multiple of this: matrix kernels like it, and shapes repeat."""
Segments = list[tuple[NDArray[Any], NDArray[np.int64]]]
"""(tokens [B, room], lengths [B]) of each segment of B rows."""
PREDICTED = "predicted"
"""Key of `Task.loss_sums` beside the sums."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass on one rank."""

    inputs: dict[str, Tensor]
    targets: dict[str, int]
    """Objective -> number of targets in this micro-batch."""
    tokens: int
    """Tokens that are not padding, of real rows."""
    slots: int
    """Places in the padded rectangle, rows x length."""

    def to(self, device: torch.device) -> MicroBatch:
        """On a GPU the copy is only begun: work that is queued there later finds it done."""
        if device.type == "cpu":
            return self
        pinned = device.type == "cuda"
        moved = {
            name: (value.pin_memory() if pinned else value).to(device, non_blocking=True)
            for name, value in self.inputs.items()
        }
        return MicroBatch(moved, self.targets, self.tokens, self.slots)


class Task(ABC):
    """One objective set.  A subclass a file; the registry is in tasks/registry.py."""

    data_kind: ClassVar[str]
    """Kind of prepared data set that this task reads (manifest.json, `kind`)."""
    other_kinds: ClassVar[tuple[str, ...]] = ()
    """Further kinds that it can read."""
    objectives: tuple[str, ...]
    """Names of the losses that are added up, each averaged over its own targets."""
    partner_columns: tuple[str, ...] = ()
    """Columns of another row of the same block that collate wants beside each row."""

    def __init__(self, tokenizer: Tokenizer, view: View, seed: int) -> None:
        manifest = view.manifest
        if manifest.kind not in (self.data_kind, *self.other_kinds):
            raise DataError(
                f"this task reads data of kind `{self.data_kind}`, the data set is of kind `{manifest.kind}`",
                where="data.train",
                do=f"Prepare it with `dist-lm data prepare --kind {self.data_kind}`.",
            )
        self.tokenizer = tokenizer
        self.view = view
        self.seed = seed

    @abstractmethod
    def build_model(self, section: ModelSection) -> PreTrainedModel:
        """The model with this task's head, fp32, on the CPU."""

    def described(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, its config telling whoever predicts with it how its inputs were made."""
        model.config.dist_lm = {"kind": self.data_kind, "seq_len": self.view.seq_len, **self.view.manifest.facts}
        return model

    def prepare_for(self, model: PreTrainedModel) -> None:  # noqa: B027
        """Learn what a model that was built elsewhere allows; `build_model` has done it for its own.

        The model is fp32, whole and on the CPU.  Without it losses are right, but may cost more.
        """

    @abstractmethod
    def collate(self, rows: Rows) -> MicroBatch:
        """Features of these rows; runs on the host, without a stateful generator."""

    @abstractmethod
    def loss_sums(self, model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`<objective>_loss` (fp32, differentiable) and `<objective>_correct` sums over targets.

        A task with metrics adds PREDICTED while the model does not train: classes or values, never
        logits.
        """

    def metrics_state(self) -> MetricState | None:
        """Metrics beyond loss and accuracy, empty; None where the task has none."""
        return None

    def judge(self, state: MetricState, predicted: Tensor, micro_batch: MicroBatch) -> None:
        """Add what was predicted for a micro-batch, on the host, to the metrics."""
        raise NotImplementedError(f"{type(self).__name__} has metrics and does not say what was predicted")

    def row_lengths(self, rows: Rows) -> NDArray[np.int64]:
        """[R] tokens of each row, as far as padding goes."""
        names = {column.lengths for column in self.view.columns if column.lengths in rows.columns}
        lengths = np.zeros(len(rows), dtype=np.int64)
        for name in names:
            lengths += rows.columns[name]
        return lengths

    def divide(self, rows: Rows, plan: BatchPlan) -> list[Rows]:
        """A rank's rows of a step as the plan's micro-batches; each real row is in one of them."""
        return in_order(self.by_length(rows), plan)

    def by_length(self, rows: Rows) -> Rows:
        """The rows of a batch, short ones first, so that micro-batches hold rows of like length.

        A function of the batch alone; the gradient is a sum over its rows in any order.
        """
        return rows.take(np.argsort(self.row_lengths(rows), kind="stable"))


def in_order(rows: Rows, plan: BatchPlan) -> list[Rows]:
    """This rank's rows as the plan's micro-batches; the last is filled with rows of weight zero."""
    size = plan.rows_per_micro
    return [rows.take(slice(begin, begin + size)).padded(size) for begin in range(0, size * plan.micro_steps, size)]


class TaskModule(nn.Module):
    """Model and loss as one module, so that DeepSpeed's hooks see the whole forward pass.

    The model's activations are fused from then on: what is exported is loaded without that.
    """

    def __init__(self, model: PreTrainedModel, task: Task) -> None:
        super().__init__()
        activations.fuse(model)
        self.model = model
        self._task = task

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return self._task.loss_sums(self.model, inputs)


def join_segments(segments: Segments, tokenizer: Tokenizer, *, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """[CLS] s1 [SEP] s2 [SEP] for each row; empty segments take no [SEP], but the first does.

    `end` is the longest row allowed.  Returns input_ids [B, T], segment_ids [B, T] and lengths [B], T a
    multiple of LENGTH_MULTIPLE.
    """
    num_rows = len(segments[0][1])
    counts, lengths_B = _counts(segments), joined_lengths(segments)
    longest = int(lengths_B.max())
    width = min(-(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, end)
    ids_BT = np.full((num_rows, width), tokenizer.pad_id, dtype=np.int64)
    kinds_BT = np.zeros((num_rows, width), dtype=np.int64)
    ids_BT[:, 0] = tokenizer.cls_id
    begin_B = np.ones(num_rows, dtype=np.int64)
    for number, ((tokens, lengths), count_B) in enumerate(zip(segments, counts, strict=True)):
        source = np.arange(tokens.shape[1])[None, :] < lengths[:, None]
        row, column = np.nonzero(source)
        ids_BT[row, begin_B[row] + column] = tokens[row, column]
        closed = np.nonzero(count_B > 0)[0]
        ids_BT[closed, begin_B[closed] + lengths[closed]] = tokenizer.sep_id
        if number:
            place = np.arange(width)[None, :]
            kinds_BT[(place >= begin_B[:, None]) & (place < (begin_B + count_B)[:, None])] = number
        begin_B = begin_B + count_B
    return ids_BT, kinds_BT, lengths_B


def joined_lengths(segments: Segments) -> NDArray[np.int64]:
    """[B] tokens of each row that `join_segments` makes."""
    lengths_B: NDArray[np.int64] = np.sum(_counts(segments), axis=0) + 1
    return lengths_B


def _counts(segments: Segments) -> list[NDArray[np.int64]]:
    """[B] tokens of each segment, with its [SEP]."""
    return [lengths.astype(np.int64) + ((lengths > 0) | (i == 0)) for i, (_, lengths) in enumerate(segments)]


def attention_inputs(ids_BT: np.ndarray, kinds_BT: np.ndarray, lengths_B: np.ndarray) -> dict[str, Tensor]:
    """Inputs every encoder takes.  Rows without padding carry no mask: attention is faster so."""
    inputs = {"input_ids": torch.from_numpy(ids_BT), "token_type_ids": torch.from_numpy(kinds_BT)}
    if int(lengths_B.min()) < ids_BT.shape[1]:
        mask_BT = np.arange(ids_BT.shape[1])[None, :] < lengths_B[:, None]
        inputs["attention_mask"] = torch.from_numpy(mask_BT.astype(np.int64))
    return inputs


def encoder_arguments(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """What an encoder takes of the inputs; segment ids only where it tells segments apart."""
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs.get("attention_mask")}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        arguments["token_type_ids"] = inputs["token_type_ids"]
    return arguments


def clipped(rows: Rows, tokens: str, lengths: str) -> tuple[np.ndarray, np.ndarray]:
    """A column of tokens [B, T] without the padding that no row needs, and the lengths [B].

    T is a multiple of LENGTH_MULTIPLE, or the column's capacity.
    """
    lengths_B = rows.columns[lengths].astype(np.int64)
    capacity = rows.columns[tokens].shape[1]
    width = min(-(-int(lengths_B.max()) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE, capacity)
    return rows.columns[tokens][:, :width].astype(np.int64), lengths_B


def head_fields(labels: tuple[str, ...]) -> dict[str, Any]:
    """Config fields that name the classes of a classification head."""
    return {
        "num_labels": len(labels),
        "id2label": dict(enumerate(labels)),
        "label2id": {label: number for number, label in enumerate(labels)},
    }


def cross_entropy_sums(
    objective: str,
    logits_NC: Tensor,
    labels_N: Tensor,
    *,
    weights_C: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Loss (fp32) and correct predictions of N targets over C classes, as sums."""
    loss = F.cross_entropy(
        logits_NC.float(), labels_N, weight=weights_C, reduction="sum", label_smoothing=label_smoothing
    )
    correct = (logits_NC.detach().argmax(dim=-1) == labels_N).sum()
    return {f"{objective}_loss": loss, f"{objective}_correct": correct}
