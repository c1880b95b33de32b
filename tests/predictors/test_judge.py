"""Figures of records: those of the models' own losses, slices, and what cannot be judged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from dist_lm.errors import ConfigError, DataError
from dist_lm.judge import Slicing, judge_file
from dist_lm.predict import Request
from dist_lm.predictors.base import PredictOptions
from dist_lm.predictors.registry import predictor_for
from dist_lm.trained import open_trained
from tests.predictors.small_models import predictions, write_records

pytestmark = pytest.mark.fast
CPU = torch.device("cpu")
TEXTS = ["The import statement", "a class definition is an executable statement", "pass", "yield from", "x = 3 + y"]


def judged(
    folder: Path, records: list[dict[str, Any]], tmp_path: Path, slicing: Slicing | None = None, **more: Any
) -> Any:
    source = write_records(tmp_path / "judged.jsonl", records)
    return judge_file(Request(str(folder), str(source), **more), slicing or Slicing(resamples=0))


def test_eval_figures_slices_and_intervals(models: Any, tmp_path: Path) -> None:
    folder = models("BertForSequenceClassification")
    guesses = [one["label"] for one in predictions(folder, [{"text": text} for text in TEXTS], tmp_path)]
    # Right for one source, wrong for the other.
    other = {"neg": "pos", "neutral": "neg", "pos": "neutral"}
    records = [{"text": t, "label": g, "source": "a"} for t, g in zip(TEXTS, guesses, strict=True)]
    records += [{"text": t, "label": other[g], "source": "b"} for t, g in zip(TEXTS, guesses, strict=True)]
    report = judged(folder, records, tmp_path, Slicing(("source", "absent"), resamples=50, seed=3))
    assert report["figures"]["accuracy"] == 0.5
    assert report["slices"]["source"]["a"]["figures"]["accuracy"] == 1.0
    assert report["slices"]["source"]["b"]["figures"]["accuracy"] == 0.0
    assert report["slices"]["absent"]["(missing)"]["records"] == 10
    low, high = report["intervals"]["accuracy"]
    assert 0.1 <= low < 0.5 < high <= 0.9
    assert report == judged(folder, records, tmp_path, Slicing(("source", "absent"), resamples=50, seed=3))
    many = [{"text": "x", "label": "pos", "n": number} for number in range(101)]
    with pytest.raises(ConfigError, match="has 101 values"):
        judged(folder, many, tmp_path, Slicing(("n",), resamples=0))


@pytest.mark.parametrize(
    ("class_name", "record", "reason"),
    [
        ("BertForSequenceClassification", {"text": "x", "label": "good"}, "does not know the label `good`"),
        ("BertForSequenceClassification", {"text": "x"}, "no field 'label'"),
        ("BertForSequenceClassification", {"text": "x", "label": 0.5}, "a class has a name"),
        ("BertForTokenClassification", {"tokens": ["x"], "tags": ["B-ORG"]}, "does not know tag 0 `B-ORG`"),
        ("BertForTokenClassification", {"tokens": ["x"], "tags": ["I-LOC"]}, "follows `O`"),
        (
            "BertForQuestionAnswering",
            {"question": "x", "context": "y", "answers": [{"text": "z", "answer_start": 0}]},
            "nowhere in it",
        ),
        ("GPT2LMHeadModel", {"text": "x"}, "shorter than two tokens"),
    ],
)
def test_what_cannot_be_judged_is_named_with_its_record(
    models: Any, tmp_path: Path, class_name: str, record: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=r"judged\.jsonl:1: .*" + reason):
        judged(models(class_name), [record], tmp_path)


def test_records_that_are_all_allowed_to_be_bad_give_no_figures(models: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no record could be used"):
        judged(models("BertForSequenceClassification"), [{"text": "x"}], tmp_path, max_bad=1)


def test_perplexity_is_that_of_the_models_own_loss(models: Any, tmp_path: Path) -> None:
    folder = models("GPT2LMHeadModel")
    report = judged(folder, [{"text": text} for text in TEXTS[:2]], tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in TEXTS[:2]:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        total += model(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert report["figures"]["loss"] == pytest.approx(total / count, rel=1e-5)
    assert report["figures"]["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_pseudo_perplexity_masks_each_token_alone(models: Any, tmp_path: Path) -> None:
    folder = models("BertForMaskedLM")
    report = judged(folder, [{"text": text} for text in TEXTS[:2]], tmp_path)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    losses, right = [], []
    for text in TEXTS[:2]:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        for place in range(1, ids.shape[1] - 1):
            masked = ids.clone()
            masked[0, place] = tokenizer.mask_token_id
            labels = torch.full_like(ids, -100)
            labels[0, place] = ids[0, place]
            with torch.no_grad():
                output = model(masked, labels=labels)
            losses.append(output.loss.item())
            right.append(int(output.logits[0, place].argmax()) == int(ids[0, place]))
    figures = report["figures"]
    assert figures["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert figures["pseudo_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert figures["accuracy"] == sum(right) / len(right)
    assert "masked alone" in report["signature"]
    # A long text is judged in windows, every token of it once.
    long = " ".join(TEXTS * 8)
    predictor = predictor_for(open_trained(str(folder)), None, PredictOptions(seq_len=16, batch_rows=64), CPU)
    (total,) = predictor.judge([predictor.expected({"text": long})])
    assert total["tokens"] == len(tokenizer(long, add_special_tokens=False)["input_ids"])
