"""Generated text against a reference: sacreBLEU, chrF, ROUGE-L; and the perplexity of given text.

Enters: a hypothesis and a reference.  Leaves: corpus figures, with sacreBLEU's signatures.
Promises: the figures are those of sacrebleu's corpus_score and rouge-score on the same texts.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_lm.scores.base import Counts, MetricSet, ratio


class Generated(MetricSet):
    """Statistics of BLEU and of chrF, one after the other; then the sum of ROUGE-L, and records."""

    def __init__(self, tokenize: str = "13a") -> None:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF

        # force: a record that ends in " ." is not worth a warning a text.
        self._metrics: tuple[Any, Any] = (BLEU(tokenize=tokenize, force=True), CHRF())
        self._rouge = RougeScorer(["rougeL"], use_stemmer=False)
        self._widths = tuple(len(self._statistics(metric, "a", "a")) for metric in self._metrics)
        self.width = sum(self._widths) + 2
        names = ("BLEU", "chrF")
        self.signature = "; ".join(
            f"{name} {metric.get_signature()}" for name, metric in zip(names, self._metrics, strict=True)
        )

    def counts(self, predicted: str, expected: str) -> Counts:
        statistics = [self._statistics(metric, predicted, expected) for metric in self._metrics]
        rouge = self._rouge.score(expected, predicted)["rougeL"].fmeasure
        return dict(enumerate([*statistics[0], *statistics[1], rouge, 1.0]))

    def figures(self, totals: NDArray[np.float64]) -> dict[str, float]:
        bleu, chrf = self._widths
        parts = (totals[:bleu].tolist(), totals[bleu : bleu + chrf].tolist())
        # sacrebleu's own resampling goes through the same two methods; it has no public ones.
        scores = [
            metric._compute_score_from_stats([int(value) for value in part]).score
            for metric, part in zip(self._metrics, parts, strict=True)
        ]
        return {"bleu": scores[0], "chrf": scores[1], "rouge_l": 100 * ratio(totals[-2], totals[-1])}

    @staticmethod
    def _statistics(metric: Any, hypothesis: str, reference: str) -> list[float]:
        statistics: list[float] = metric._extract_corpus_statistics([hypothesis], [[reference]])[0]
        return statistics


class LanguageModelling(MetricSet):
    """Sum of the losses of tokens, tokens guessed right, tokens."""

    width = 3

    def __init__(self, name: str = "perplexity", signature: str = "") -> None:
        """`name`: of the exponent of the loss."""
        self._name, self.signature = name, signature

    def counts(self, predicted: tuple[float, int], expected: int) -> Counts:
        loss, right = predicted
        return {0: loss, 1: float(right), 2: float(expected)}

    def figures(self, totals: NDArray[np.float64]) -> dict[str, float]:
        loss = ratio(totals[0], totals[2])
        return {"loss": loss, self._name: math.exp(min(loss, 700.0)), "accuracy": ratio(totals[1], totals[2])}
