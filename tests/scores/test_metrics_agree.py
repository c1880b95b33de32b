"""Figures beside those of the libraries and scripts that define them; sums over parts equal the whole."""

from __future__ import annotations

import collections
import random
import re
import string
from typing import Any

import numpy as np
import pytest
import sacrebleu
from scipy.stats import pearsonr, spearmanr
from seqeval.metrics import classification_report
from seqeval.scheme import IOB2
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from dist_lm.scores.answers import Answers
from dist_lm.scores.base import MetricSet, MetricState, as_rows
from dist_lm.scores.classes import ManyClasses, Numbers, OneClass
from dist_lm.scores.entities import Entities
from dist_lm.scores.generated import Generated

pytestmark = pytest.mark.fast
LABELS = ("a", "b", "c", "d")
TAGS = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
SENTENCES = ["the cat sat on the mat.", "A dog, running fast", "nothing", "", "Der Hund lief schnell über die Wiese"]


def figures(metrics: MetricSet, pairs: list[tuple[Any, Any]]) -> dict[str, float]:
    return metrics.of_records(as_rows([metrics.counts(*pair) for pair in pairs], metrics.width))


def draws(seed: int, count: int = 200) -> random.Random:
    return random.Random(seed * count)


def test_classes_agree_with_scikit_learn() -> None:
    rng = draws(1)
    # Class d is never there: it takes no part in macro F1.
    pairs = [(rng.randrange(3), rng.randrange(3)) for _ in range(200)]
    predicted, expected = zip(*pairs, strict=True)
    ours = figures(OneClass(LABELS), pairs)
    assert ours["accuracy"] == pytest.approx(accuracy_score(expected, predicted), rel=1e-12)
    assert ours["macro_f1"] == pytest.approx(f1_score(expected, predicted, average="macro"), rel=1e-12)
    assert ours["mcc"] == pytest.approx(matthews_corrcoef(expected, predicted), rel=1e-12)


def test_many_classes_agree_with_scikit_learn() -> None:
    rng = draws(2)
    pairs = [
        ([c for c in range(4) if rng.random() < 0.4], [c for c in range(4) if rng.random() < 0.4]) for _ in range(100)
    ]
    matrix = np.array([[[c in chosen for c in range(4)] for chosen in pair] for pair in pairs])
    predicted, expected = matrix[:, 0], matrix[:, 1]
    ours = figures(ManyClasses(LABELS), pairs)
    assert ours["exact_match"] == pytest.approx(accuracy_score(expected, predicted), rel=1e-12)
    assert ours["micro_f1"] == pytest.approx(f1_score(expected, predicted, average="micro"), rel=1e-12)
    assert ours["macro_f1"] == pytest.approx(f1_score(expected, predicted, average="macro"), rel=1e-12)


def test_correlations_agree_with_scipy_with_ties() -> None:
    rng = draws(3)
    pairs = [(round(rng.gauss(0, 1), 1), round(rng.gauss(0, 2), 0)) for _ in range(100)]
    predicted, expected = zip(*pairs, strict=True)
    ours = figures(Numbers(), pairs)
    assert ours["pearson"] == pytest.approx(pearsonr(predicted, expected).statistic, rel=1e-9)
    assert ours["spearman"] == pytest.approx(spearmanr(predicted, expected).statistic, rel=1e-9)


def test_entities_agree_with_seqeval_in_strict_mode() -> None:
    rng = draws(4)
    expected, predicted = ([[rng.choice(TAGS) for _ in range(9)] for _ in range(80)] for _ in range(2))
    metrics = Entities(TAGS)
    rows = as_rows([metrics.counts(p, e) for p, e in zip(predicted, expected, strict=True)], metrics.width)
    report = classification_report(expected, predicted, mode="strict", scheme=IOB2, output_dict=True)
    ours = metrics.of_records(rows)
    for name, key in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
        assert ours[f"entity_{name}"] == pytest.approx(report["micro avg"][key], rel=1e-12)
        for kind, line in metrics.table(np.asarray(rows.sum(axis=0))).items():
            assert line[name] == pytest.approx(report[kind][key], rel=1e-12)


def _official_normalize(s: str) -> str:
    # evaluate-v1.1.py of SQuAD.
    def remove_articles(text: str) -> str:
        return re.sub(r"\b(a|an|the)\b", " ", text)

    exclude = set(string.punctuation)
    return " ".join(remove_articles("".join(ch for ch in s.lower() if ch not in exclude)).split())


def _official_f1(prediction: str, truth: str) -> float:
    # evaluate-v2.0.py of SQuAD, compute_f1.
    gold, found = _official_normalize(truth).split(), _official_normalize(prediction).split()
    common = collections.Counter(gold) & collections.Counter(found)
    num_same = sum(common.values())
    if len(gold) == 0 or len(found) == 0:
        return int(gold == found)
    if num_same == 0:
        return 0
    precision, recall = num_same / len(found), num_same / len(gold)
    return (2 * precision * recall) / (precision + recall)


def test_answers_agree_with_the_official_scripts() -> None:
    pairs = [
        ("the Panthers' defense", ["Panthers defense", "defense"]),
        ("A cat, an owl", ["cat and owl"]),
        ("", []),
        ("something", []),
        ("", ["The"]),
        ("308 points", ["308", "just 308 points!"]),
        ("", ["24"]),
    ]
    exact, f1 = [], []
    for prediction, truths in pairs:
        golds = [truth for truth in truths if _official_normalize(truth)] or [""]
        exact.append(max(int(_official_normalize(gold) == _official_normalize(prediction)) for gold in golds))
        f1.append(max(_official_f1(prediction, gold) for gold in golds))
    ours = figures(Answers(), pairs)
    assert ours["exact_match"] == pytest.approx(100 * np.mean(exact), rel=1e-12)
    assert ours["f1"] == pytest.approx(100 * np.mean(f1), rel=1e-12)
    assert ours["no_answer_accuracy"] == pytest.approx(100 * np.mean([exact[2], exact[3], exact[4]]), rel=1e-12)


def test_generated_text_agrees_with_sacrebleu() -> None:
    rng = draws(5)
    references = [" ".join(rng.sample(text.split(), len(text.split()))) for text in SENTENCES]
    metrics = Generated()
    ours = figures(metrics, list(zip(SENTENCES, references, strict=True)))
    assert ours["bleu"] == pytest.approx(sacrebleu.corpus_bleu(SENTENCES, [references]).score, rel=1e-12)
    assert ours["chrf"] == pytest.approx(sacrebleu.corpus_chrf(SENTENCES, [references]).score, rel=1e-12)
    assert "tok:13a" in metrics.signature
    perfect = figures(metrics, [(text, text) for text in SENTENCES[:3]])
    assert perfect["bleu"] == pytest.approx(100.0)
    assert perfect["rouge_l"] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("metrics", "pairs"),
    [
        (OneClass(LABELS), [(n % 3, n % 4) for n in range(11)]),
        (Numbers(), [(n % 3, n**0.5) for n in range(11)]),
        (Entities(TAGS), [([TAGS[n % 5]], [TAGS[n % 3]]) for n in range(11)]),
        (Answers(), [("b", ["b c"] * (n % 2)) for n in range(11)]),
    ],
    ids=["classes", "numbers", "entities", "answers"],
)
def test_ranks_together_and_resamples_equal_the_whole(metrics: MetricSet, pairs: list[tuple[Any, Any]]) -> None:
    whole = figures(metrics, pairs)
    states = [MetricState(metrics) for _ in range(3)]
    for number, pair in enumerate(pairs):
        states[number % 3].add(*pair)
    assert states[0].compute([state.counts() for state in states]) == pytest.approx(whole, rel=1e-12)
    rows = as_rows([metrics.counts(*pair) for pair in pairs], metrics.width)
    times = np.arange(len(pairs)) % 3
    repeated = [pair for pair, count in zip(pairs, times, strict=True) for _ in range(count)]
    assert metrics.of_records(rows, times) == pytest.approx(figures(metrics, repeated), rel=1e-12)
