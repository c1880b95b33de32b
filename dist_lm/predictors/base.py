"""What a trained model says about records, and how right it is.

Enters: a Trained model, the fields of records.  Leaves: a prediction for each, in their order; for
records that say what is expected, the counts of the task's metrics.
Promises: a prediction depends on its record alone, not on its neighbours, but for rounding.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from dist_lm.data.kinds.base import Fields
from dist_lm.data.ragged import padded
from dist_lm.errors import ConfigError
from dist_lm.predictors.attributions import Attributor
from dist_lm.scores.base import Counts, MetricSet
from dist_lm.trained import Trained

Item = TypeVar("Item")
Result = TypeVar("Result")
Prediction = dict[str, Any]


@dataclass(frozen=True)
class PredictOptions:
    """How to predict; what belongs to another task has no effect."""

    batch_rows: int = 16
    """Rows of one forward pass."""
    seq_len: int | None = None
    """Tokens of a model input; None: as the model was trained, or its positions."""
    top_k: int = 5
    """Guesses for a mask."""
    beams: int = 1
    """Beams of generation; 1 is greedy."""
    max_new_tokens: int = 64
    """Tokens generated at most."""
    doc_stride: int | None = None
    """Tokens that windows of a context share; None: as the model was trained."""
    n_best: int = 5
    """Answers to a question."""
    max_answer_tokens: int = 30
    """Tokens of an answer at most."""
    null_threshold: float | None = None
    """A question has no answer where that scores higher than the best one by more than this; None: every
    question has one."""
    bleu_tokenize: str = "13a"
    """sacreBLEU's tokenizer."""
    explain: bool = False
    """Say with each prediction which parts of the text it rests on."""


class Predictor(ABC):
    """One task's predictions.  A subclass a file; registry.py names them all."""

    fields: ClassVar[Mapping[str, str]]
    """What a record must have, in words."""
    foresees: ClassVar[bool] = False
    """A record is judged by how well its own text is foreseen (`judge`); nothing is predicted for it."""

    def __init__(self, trained: Trained, options: PredictOptions, device: torch.device) -> None:
        self.trained, self.options, self.device = trained, options, device
        self.model: Any = trained.model.to(device)
        self.tokenizer = trained.tokenizer
        positions = getattr(trained.model.config, "max_position_embeddings", None)
        wanted = options.seq_len or trained.made.get("seq_len") or min(positions or _USUAL_LENGTH, _USUAL_LENGTH)
        if positions is not None and wanted > positions:
            raise ConfigError(
                f"inputs of {wanted} tokens do not fit a model with {positions} positions",
                where="--seq-len",
                do=f"Write {positions} or less.",
            )
        self.seq_len = int(wanted)

    @abstractmethod
    def clean(self, fields: Fields) -> Any:
        """What is needed of a record.  Raises Unusable."""

    @abstractmethod
    def predict(self, cleaned: Sequence[Any]) -> list[Prediction]:
        """A prediction for each record."""

    def explain(self, cleaned: Any, prediction: Prediction) -> list[dict[str, Any]]:
        """Attributions of what was predicted for one record.  ConfigError for a task that has none."""
        raise ConfigError(
            f"predictions of {self.trained.task} are not explained",
            where="--explain",
            do="It is for classification and token_classification.",
        )

    @abstractmethod
    def expected(self, fields: Fields) -> Any:
        """What the record says should be predicted.  Raises Unusable."""

    def judge(self, expected: Sequence[Any]) -> list[Prediction]:
        """What `counts` takes of each record, where the text itself is foreseen."""
        raise NotImplementedError(f"{type(self).__name__} predicts, and its predictions are judged")

    @abstractmethod
    def metric_set(self) -> MetricSet:
        """How predictions are judged."""

    @abstractmethod
    def counts(self, metrics: MetricSet, prediction: Prediction, expected: Any) -> Counts:
        """What one judged prediction adds to the metrics."""

    def batch(self, rows: Sequence[Sequence[int]], **more: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and `more` columns [B, T], padded, on the device."""
        width = max(map(len, rows))
        ids, lengths = padded(rows, width, self.tokenizer.pad_id, "int64")
        tensors = {"input_ids": torch.from_numpy(ids)}
        tensors["attention_mask"] = (torch.arange(width) < torch.from_numpy(lengths.astype("int64"))[:, None]).long()
        for name, values in more.items():
            tensors[name] = torch.from_numpy(padded(values, width, 0, "int64")[0])
        return {name: tensor.to(self.device) for name, tensor in tensors.items()}

    @cached_property
    def attributor(self) -> Attributor:
        return Attributor(self.model, self.tokenizer.pad_id, rows=self.options.batch_rows)

    def in_batches(
        self, items: Sequence[Item], length: Callable[[Item], int], work: Callable[[list[Item]], Sequence[Result]]
    ) -> list[Result]:
        """Results in the order of the items, computed side by side with others of like length."""
        order = sorted(range(len(items)), key=lambda number: length(items[number]))
        results: dict[int, Result] = {}
        for begin in range(0, len(order), self.options.batch_rows):
            chosen = order[begin : begin + self.options.batch_rows]
            with torch.inference_mode():
                done = work([items[number] for number in chosen])
            results.update(zip(chosen, done, strict=True))
        return [results[number] for number in range(len(items))]


_USUAL_LENGTH = 512
"""Tokens of a model input where neither the model nor the user says."""
