"""Attributions of labels and entities: they add up, and find the word that decides."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.errors import ConfigError, EnvironmentFault
from dist_lm.predict import Request, page_of, predict_file
from dist_lm.predictors.base import PredictOptions
from tests.predictors.small_models import read_records, save_model, write_records

pytestmark = pytest.mark.fast
TEXTS = ["The import statement", "a class definition is an executable statement", "x = <3> & y"]


def explained(folder: Path, records: list[dict[str, Any]], tmp_path: Path, **options: Any) -> tuple[list[Any], str]:
    source = write_records(tmp_path / "in.jsonl", records)
    out = tmp_path / "out.jsonl"
    predict_file(Request(str(folder), str(source), PredictOptions(explain=True, **options)), out)
    return [line["prediction"]["explanations"] for line in read_records(out)], page_of(out).read_text()


def check_sum(one: dict[str, Any]) -> None:
    difference = one["score"] - one["baseline_score"]
    total = sum(part["attribution"] for part in one["attributions"])
    assert abs(total - difference) <= abs(one["convergence_delta"]) + 1e-4
    assert abs(one["convergence_delta"]) <= max(0.01 * abs(difference), 1e-3)
    assert abs(difference) > 1e-3


@pytest.mark.parametrize(
    ("changes", "second"),
    [
        ({}, None),
        ({"dist_lm": {"seq_len": 64, "text_pair": True}}, "of a second text"),
        ({"labels": ["value"], "problem_type": "regression"}, None),
    ],
    ids=["label", "pair", "value"],
)
def test_attributions_add_up_to_what_the_text_changes(
    topics_data: Path, tmp_path: Path, changes: dict[str, Any], second: str | None
) -> None:
    folder = save_model("BertForSequenceClassification", topics_data / "tokenizer", tmp_path / "model", **changes)
    records = [{"text": text, **({"text_pair": second} if second else {})} for text in TEXTS]
    explanations, page = explained(folder, records, tmp_path)
    for record, (one,) in zip(records, explanations, strict=True):
        check_sum(one)
        for part in one["attributions"]:
            assert record[part["field"]][part["start"] : part["end"]] == part["text"] != ""
        fields = [part["field"] for part in one["attributions"]]
        assert ("text_pair" in fields) == bool(second)
    assert page.count("<section>") == len(TEXTS)
    assert "<script" not in page
    assert "http" not in page
    assert "&lt;" in page
    assert "light dark" in page


def test_each_label_that_holds_is_explained(topics_data: Path, tmp_path: Path) -> None:
    folder = save_model(
        "BertForSequenceClassification", topics_data / "tokenizer", tmp_path / "model",
        problem_type="multi_label_classification",
    )  # fmt: skip
    source = write_records(tmp_path / "in.jsonl", [{"text": text} for text in TEXTS])
    predict_file(Request(str(folder), str(source), PredictOptions(explain=True)), tmp_path / "out.jsonl")
    for line in read_records(tmp_path / "out.jsonl"):
        assert [one["target"] for one in line["prediction"]["explanations"]] == line["prediction"]["labels"]


def test_an_entity_is_explained_by_the_words_of_its_window(topics_data: Path, tmp_path: Path) -> None:
    folder = save_model("BertForTokenClassification", topics_data / "tokenizer", tmp_path / "model")
    text = "John Smith went to New York, and then home. " * 3
    words = text.replace(",", " ,").replace(".", " .").split()
    (tmp_path / "few").mkdir()
    explanations, page = explained(folder, [{"text": text}, {"tokens": words}], tmp_path / "few", seq_len=48)
    predictions = [line["prediction"] for line in read_records(tmp_path / "few" / "out.jsonl")]
    for source, field, prediction, found in zip(
        (text, " ".join(words)), ("text", "tokens"), predictions, explanations, strict=True
    ):
        entities = prediction["entities"]
        assert [one["target"] for one in found] == [f"{entity['type']}: {entity['text']}" for entity in entities] != []
        for one, entity in zip(found, entities, strict=True):
            check_sum(one)
            spans = [(part["start"], part["end"]) for part in one["attributions"]]
            assert all(
                source[begin:end] == part["text"] for (begin, end), part in zip(spans, one["attributions"], strict=True)
            )
            assert {part["field"] for part in one["attributions"]} == {field}
            assert entity["start"] in [begin for begin, _ in spans]
    assert page.count("<strong>") == sum(map(len, explanations))


def test_the_word_that_decides_has_the_largest_attribution(topics_data: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(topics_data / "tokenizer")
    folder = save_model("BertForSequenceClassification", topics_data / "tokenizer", tmp_path / "model")
    config = BertConfig.from_pretrained(folder)
    torch.manual_seed(5)
    config.initializer_range, config.hidden_dropout_prob, config.attention_probs_dropout_prob = 0.05, 0.0, 0.0
    model = BertForSequenceClassification(config)
    decides = tokenizer.vocabulary["import"]
    others = torch.tensor([number for token, number in tokenizer.vocabulary.items() if token.isalpha()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        ids = others[torch.randint(len(others), (32, 10))]
        ids[ids == decides] = others[0]
        ids[:, 0], ids[:, -1] = tokenizer.cls_id, tokenizer.sep_id
        ids[torch.arange(16), torch.randint(1, 9, (16,))] = decides
        loss = model(input_ids=ids, labels=torch.tensor([2] * 16 + [0] * 16)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.2
    model.save_pretrained(folder)
    explanations, _ = explained(folder, [{"text": f"the class import {text}"} for text in TEXTS[1:]], tmp_path)
    for (one,) in explanations:
        assert one["target"] == "pos"
        assert max(one["attributions"], key=lambda part: part["attribution"])["text"] == "import"


def test_what_cannot_be_explained_says_so(topics_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model("BertForMaskedLM", topics_data / "tokenizer", tmp_path / "mask")
    with pytest.raises(ConfigError, match="fill_mask are not explained"):
        explained(folder, [{"text": "a [MASK]"}], tmp_path)
    t5 = save_model("T5ForSequenceClassification", topics_data / "tokenizer", tmp_path / "t5", num_labels=2)
    with pytest.raises(ConfigError, match="share their embeddings"):
        explained(t5, [{"text": "a class"}], tmp_path)
    folder = save_model("BertForSequenceClassification", topics_data / "tokenizer", tmp_path / "model")
    (tmp_path / "out.html").write_text("mine")
    with pytest.raises(ConfigError, match=r"out\.html exists already"):
        explained(folder, [{"text": "a class"}], tmp_path)
    (tmp_path / "out.html").unlink()
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(EnvironmentFault, match="package captum"):
        explained(folder, [{"text": "a class"}], tmp_path)
    assert not (tmp_path / "out.jsonl").exists()
