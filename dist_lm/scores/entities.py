"""Entities in tagged words: strict F1 over IOB2, as seqeval defines it, and accuracy of tags.

Enters: predicted and expected tags of a text.  Leaves: micro F1 over entities, a table by type.
Promises: an entity counts where its type and both ends are right; a predicted I- without its B- is no
entity (seqeval's strict mode with IOB2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dist_lm.scores.base import Counts, MetricSet, Table, f1_of, ratio
from dist_lm.scores.classes import class_figures

Span = tuple[str, int, int]
"""Type, first word, word after the last one."""


class Entities(MetricSet):
    """Counts a type: right, predicted, expected; then tags that are right, and tags."""

    signature = "seqeval strict IOB2, micro average"

    def __init__(self, tags: Sequence[str]) -> None:
        self.types = entity_types(tags)
        self.width = 3 * len(self.types) + 2

    def counts(self, predicted: Sequence[str], expected: Sequence[str]) -> Counts:
        found, wanted = set(entity_spans(predicted)), set(entity_spans(expected))
        counts: dict[int, float] = {}
        for place, spans in enumerate((found & wanted, found, wanted)):
            for name, _, _ in spans:
                key = 3 * self.types.index(name) + place
                counts[key] = counts.get(key, 0.0) + 1.0
        counts[self.width - 2] = float(sum(a == b for a, b in zip(predicted, expected, strict=True)))
        counts[self.width - 1] = float(len(expected))
        return counts

    def figures(self, totals: NDArray[np.float64]) -> dict[str, float]:
        figures = {"tag_accuracy": ratio(totals[-2], totals[-1])}
        if self.types:
            right, predicted, expected = totals[:-2].reshape(-1, 3).sum(axis=0)
            figures |= {
                "entity_precision": ratio(right, predicted),
                "entity_recall": ratio(right, expected),
                "entity_f1": f1_of(right, predicted, expected),
            }
        return figures

    def table(self, totals: NDArray[np.float64]) -> Table:
        rows = totals[:-2].reshape(-1, 3)
        return {name: class_figures(*row) for name, row in zip(self.types, rows, strict=True)}


def entity_types(tags: Sequence[str]) -> tuple[str, ...]:
    """Names behind B- and I-, sorted; none where the tags are not IOB2."""
    return tuple(sorted({tag[2:] for tag in tags if tag[:2] in ("B-", "I-")}))


def entity_spans(tags: Sequence[str]) -> list[Span]:
    """Entities of a text by seqeval's own reader of IOB2."""
    from seqeval.scheme import IOB2
    from seqeval.scheme import Entities as Reader

    if not any(tag[:2] in ("B-", "I-") for tag in tags):
        return []
    # seqeval refuses tags that are no IOB2 at all.
    checked = [tag if tag[:2] in ("B-", "I-") else "O" for tag in tags]
    return [(entity.tag, entity.start, entity.end) for entity in Reader([checked], IOB2).entities[0]]
