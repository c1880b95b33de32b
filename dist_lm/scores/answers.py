"""Answers to questions: exact match and F1, as the official SQuAD scripts (1.1 and 2.0) count them.

Enters: a predicted answer and the accepted ones.  Leaves: percentages over questions.
Promises: lower case, without punctuation, articles and runs of spaces; the best of the accepted
answers counts; a question without an answer expects the empty one.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dist_lm.scores.base import Counts, MetricSet, ratio

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = frozenset(string.punctuation)


class Answers(MetricSet):
    """Exact matches, F1 and questions: of all, and of those that have an answer."""

    width = 6
    signature = "SQuAD normalisation: lower case, no punctuation, no articles"

    def counts(self, predicted: str, expected: Sequence[str]) -> Counts:
        # An accepted answer that normalises to nothing is none, as in SQuAD 2.0's script.
        accepted = [answer for answer in expected if normalise(answer)] or [""]
        exact = max(float(normalise(predicted) == normalise(answer)) for answer in accepted)
        f1 = max(answer_f1(predicted, answer) for answer in accepted)
        counts = {0: exact, 1: f1, 2: 1.0}
        return {**counts, 3: exact, 4: f1, 5: 1.0} if accepted != [""] else counts

    def figures(self, totals: NDArray[np.float64]) -> dict[str, float]:
        exact, f1, count, has_exact, has_f1, has_count = (float(value) for value in totals)
        figures = {"exact_match": 100 * ratio(exact, count), "f1": 100 * ratio(f1, count)}
        if 0 < has_count < count:
            figures |= {
                "has_answer_exact_match": 100 * ratio(has_exact, has_count),
                "has_answer_f1": 100 * ratio(has_f1, has_count),
                "no_answer_accuracy": 100 * ratio(exact - has_exact, count - has_count),
            }
        return figures


def normalise(text: str) -> str:
    """What the official script compares."""
    plain = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return " ".join(_ARTICLES.sub(" ", plain).split())


def answer_f1(predicted: str, expected: str) -> float:
    """F1 over the words of both; where one is empty, whether both are."""
    found, wanted = normalise(predicted).split(), normalise(expected).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    return 2 * shared / (len(found) + len(wanted))
