"""Predictions of every task, beside those of transformers' pipelines where there are such."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer, pipeline
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.data.kinds.base import Unusable
from dist_lm.errors import ConfigError, DataError
from dist_lm.judge import Slicing, judge_file
from dist_lm.predict import Request, divide, predict_file
from dist_lm.predictors.base import PredictOptions
from dist_lm.predictors.registry import predictor_for
from dist_lm.predictors.token_classification import lenient_spans
from dist_lm.trained import open_trained
from tests.predictors.small_models import predictions, read_records

pytestmark = pytest.mark.fast
CPU = torch.device("cpu")
TEXTS = ["The import statement", "a class definition is an executable statement", "pass", "yield from", "x = 3 + y"]


def test_labels_are_those_of_the_pipeline(models: Any, tmp_path: Path) -> None:
    folder = models("BertForSequenceClassification")
    ours = predictions(folder, [{"text": text, "id": n} for n, text in enumerate(TEXTS)], tmp_path)
    classify = pipeline("text-classification", model=str(folder), top_k=None)
    for one, theirs in zip(ours, classify(TEXTS), strict=True):
        assert one["label"] == theirs[0]["label"]
        assert one["probabilities"] == pytest.approx({line["label"]: line["score"] for line in theirs}, rel=1e-4)
    assert len({one["label"] for one in ours}) > 1
    pair = [{"text": text, "text_pair": "of a second text"} for text in TEXTS]
    (tmp_path / "pair").mkdir()
    assert predictions(folder, pair, tmp_path / "pair")[0]["probabilities"] != ours[0]["probabilities"]


def test_many_labels_and_values(models: Any, tmp_path: Path) -> None:
    many = models("BertForSequenceClassification", problem_type="multi_label_classification")
    first = predictions(many, [{"text": text} for text in TEXTS], tmp_path)
    assert all(one["labels"] == [name for name, p in one["probabilities"].items() if p > 0.5] for one in first)
    assert any(abs(sum(one["probabilities"].values()) - 1) > 0.1 for one in first)
    number = models("BertForSequenceClassification", labels=["value"], problem_type="regression")
    (tmp_path / "number").mkdir()
    values = predictions(number, [{"text": text} for text in TEXTS], tmp_path / "number")
    assert len({one["value"] for one in values}) == len(TEXTS)


def test_entities_stand_where_the_text_has_them(models: Any, tmp_path: Path) -> None:
    folder = models("BertForTokenClassification")
    text = "John Smith went to New York, and then home. " * 12
    words = text.replace(",", " ,").replace(".", " .").split()
    ours = predictions(folder, [{"text": text}, {"tokens": words}], tmp_path)
    assert ours[0]["tags"] == ours[1]["tags"]
    assert len(ours[0]["tags"]) == len(words) > 64
    for one, source in zip(ours, (text, " ".join(words)), strict=True):
        assert one["entities"]
        for entity in one["entities"]:
            assert source[entity["start"] : entity["end"]] == entity["text"]
    # Short enough for one window: the pipeline's first sub-words say the same.
    tag = pipeline("token-classification", model=str(folder), aggregation_strategy="first", ignore_labels=[])
    sentence = "class definition"
    theirs = tag(sentence)
    (tmp_path / "short").mkdir()
    entities = predictions(folder, [{"text": sentence}], tmp_path / "short")[0]
    assert [entities["tags"][0][-3:]] == [theirs[0]["entity_group"][-3:]]


def test_spans_of_predicted_tags_may_lack_their_beginning() -> None:
    tags = ["I-PER", "I-PER", "I-LOC", "O", "B-LOC", "B-LOC", "I-LOC"]
    assert lenient_spans(tags) == [("PER", 0, 1), ("LOC", 2, 2), ("LOC", 4, 4), ("LOC", 5, 6)]


def test_answers_are_the_best_spans_over_all_windows(models: Any, tmp_path: Path, topics_data: Path) -> None:
    folder = models("BertForQuestionAnswering")
    context = " ".join(f"The {word} statement of part {n} is executed." for n, word in enumerate(TEXTS * 3))
    record = {"id": "q", "question": "Which statement?", "context": context}
    one = predictions(folder, [record], tmp_path, seq_len=48, doc_stride=12, n_best=3)[0]
    assert context[one["start"] : one["end"]] == one["answer"] != ""
    assert [candidate["score"] for candidate in one["n_best"]] == sorted(
        (candidate["score"] for candidate in one["n_best"]), reverse=True
    )
    assert sum(candidate["probability"] for candidate in one["n_best"]) == pytest.approx(1.0)
    assert one["score"] == pytest.approx(_best_by_brute_force(folder, record, seq_len=48, stride=12), rel=1e-5)
    (tmp_path / "null").mkdir()
    none = predictions(folder, [record], tmp_path / "null", null_threshold=-1e9)[0]
    assert (none["answer"], none["start"]) == ("", None)


def _best_by_brute_force(folder: Path, record: dict[str, Any], *, seq_len: int, stride: int) -> float:
    from transformers import AutoModelForQuestionAnswering

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForQuestionAnswering.from_pretrained(folder).eval()
    best = -math.inf
    windows = tokenizer(
        record["question"], record["context"], truncation="only_second", max_length=seq_len, stride=stride,
        return_overflowing_tokens=True,
    )  # fmt: skip
    for number, ids in enumerate(windows["input_ids"]):
        with torch.no_grad():
            kinds = torch.tensor([windows["token_type_ids"][number]])
            output = model(input_ids=torch.tensor([ids]), token_type_ids=kinds)
        inside = [place for place, part in enumerate(windows.sequence_ids(number)) if part == 1]
        scores = [
            (output.start_logits[0, start] + output.end_logits[0, end]).item()
            for start in inside
            for end in inside
            if 0 <= end - start < 30
        ]
        best = max(best, *scores)
    return best


@pytest.mark.parametrize("beams", [1, 3])
def test_translations_are_those_of_generate(models: Any, tmp_path: Path, beams: int) -> None:
    folder = models("T5ForConditionalGeneration", dist_lm={"kind": "seq2seq", "seq_len": 32, "prefix": "turn: "})
    ours = predictions(folder, [{"source": text} for text in TEXTS], tmp_path, beams=beams, max_new_tokens=8)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    for text, one in zip(TEXTS, ours, strict=True):
        inputs = tokenizer("turn: " + text, return_tensors="pt")
        ids = model.generate(input_ids=inputs["input_ids"], num_beams=beams, max_new_tokens=8, do_sample=False)
        assert one["text"] == tokenizer.decode(ids[0], skip_special_tokens=True).strip()


def test_masks_are_filled_as_by_the_pipeline(models: Any, tmp_path: Path) -> None:
    folder = models("BertForMaskedLM")
    texts = ["the [MASK] statement", "a [MASK] of two [MASK]"]
    ours = predictions(folder, [{"text": text} for text in texts], tmp_path, top_k=3)
    theirs = pipeline("fill-mask", model=str(folder), top_k=3)(texts)
    assert [guess["token"] for guess in ours[0]["masks"][0]] == [guess["token_str"] for guess in theirs[0]]
    assert ours[0]["masks"][0][0]["probability"] == pytest.approx(theirs[0][0]["score"], rel=1e-4)
    assert len(ours[1]["masks"]) == 2


def test_a_continuation_does_not_depend_on_its_neighbours(models: Any, tmp_path: Path) -> None:
    folder = models("GPT2LMHeadModel")
    together = predictions(folder, [{"text": text} for text in TEXTS], tmp_path, max_new_tokens=6, batch_rows=5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, one in zip(TEXTS, together, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :-1]
        written = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        assert one["text"] == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)


def test_an_answer_to_an_instruction_follows_the_template(models: Any, tmp_path: Path) -> None:
    folder = models("GPT2LMHeadModel", dist_lm={"kind": "instruction", "seq_len": 64})
    records = [
        {"prompt": "what is pass?"},
        {"prompt": "what is pass?", "response": "hidden from the model"},
        {"messages": [{"role": "user", "content": "what is pass?"}]},
    ]
    texts = [one["text"] for one in predictions(folder, records, tmp_path, max_new_tokens=5)]
    assert texts[0] == texts[1] == texts[2]


def test_bad_records_are_named_and_kept_within_the_budget(models: Any, tmp_path: Path) -> None:
    folder = models("BertForSequenceClassification")
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "fine"}\n\n{"txt": "no"}\nnot json\n{"text": "fine", "prediction": 1}\n')
    with pytest.raises(DataError) as refused:
        predict_file(Request(str(folder), str(source)), tmp_path / "out.jsonl")
    assert "3 bad records, and 0 are allowed" in str(refused.value)
    assert f"{source}:3: no field 'text' (there are: txt)" in str(refused.value)
    assert f"{source}:4: not JSON" in str(refused.value)
    assert list(tmp_path.iterdir()) == [source]
    assert predict_file(Request(str(folder), str(source), max_bad=3), tmp_path / "out.jsonl") == (4, 3)
    written = read_records(tmp_path / "out.jsonl")
    assert [line["prediction"] is None for line in written] == [False, True, True, True]
    assert "no field 'text'" in written[1]["error"]
    with pytest.raises(ConfigError, match="exists already"):
        predict_file(Request(str(folder), str(source), max_bad=3), tmp_path / "out.jsonl")


def test_records_come_from_whatever_preparation_reads(models: Any, tmp_path: Path) -> None:
    folder = models("BertForSequenceClassification")
    records = [{"text": text, "label": "pos"} for text in TEXTS]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress((lines + "[1]\n").encode()))
    (tmp_path / "in.csv").write_text("text,label\n" + "".join(f"{text},pos\n" for text in TEXTS))
    pa.parquet.write_table(pa.Table.from_pylist(records), tmp_path / "in.parquet")
    (tmp_path / "in.txt").write_text("\n".join(TEXTS))
    sources = {"in.jsonl.gz": 1, "in.csv": 0, "in.parquet": 0, "in.txt": 0}
    said, figures = [], []
    for name, bad in sources.items():
        request = Request(str(folder), str(tmp_path / name), max_bad=bad)
        out = tmp_path / f"{name}.out"
        assert predict_file(request, out) == (len(TEXTS) + bad, bad)
        said.append([line["prediction"] for line in read_records(out)][: len(TEXTS)])
        if name != "in.txt":
            figures.append(judge_file(request, Slicing(resamples=0))["figures"])
    assert said[0] == said[1] == said[2] == said[3]
    assert figures[0] == figures[1] == figures[2]
    with pytest.raises(DataError, match=r"in\.jsonl\.gz:6: a JSON object was expected, not list"):
        predict_file(Request(str(folder), str(tmp_path / "in.jsonl.gz")), tmp_path / "out.jsonl")


def test_the_verbs_predict_and_eval(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = models("BertForSequenceClassification")
    (tmp_path / "in.csv").write_text("review,label\n" + "".join(f"{text},pos\n" for text in TEXTS))
    given = ["--from", str(folder), "--in", str(tmp_path / "in.csv"), "--field", "text=review"]
    predicting = ["predict", *given, "--out", str(tmp_path / "out.jsonl"), "--explain"]
    done = CliRunner().invoke(app, predicting, catch_exceptions=False)
    assert done.stdout == f"{tmp_path / 'out.jsonl'}: {len(TEXTS)} records\n"
    written = read_records(tmp_path / "out.jsonl")
    assert [line["review"] for line in written] == TEXTS
    assert written[0]["prediction"]["explanations"]
    assert TEXTS[0].split()[0] in (tmp_path / "out.html").read_text()
    judging = ["eval", *given, "--out", str(tmp_path / "figures.json"), "--resamples", "0"]
    CliRunner().invoke(app, judging, catch_exceptions=False)
    guessed = [line["prediction"]["label"] == "pos" for line in written]
    assert json.loads((tmp_path / "figures.json").read_text())["figures"]["accuracy"] == sum(guessed) / len(TEXTS)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in (predicting, judging):
        with pytest.raises(ConfigError, match="started 2 times"):
            CliRunner().invoke(app, words, catch_exceptions=False)


def test_an_empty_file_and_a_model_of_another_task_are_refused(models: Any, tmp_path: Path) -> None:
    folder = models("BertForSequenceClassification")
    empty = tmp_path / "in.jsonl"
    empty.write_text("\n")
    with pytest.raises(DataError, match="holds no records"):
        predict_file(Request(str(folder), str(empty)), tmp_path / "out.jsonl")
    with pytest.raises(ConfigError, match="a model for classification, not for question_answering"):
        predictor_for(open_trained(str(folder)), "question_answering", PredictOptions(), CPU)
    with pytest.raises(ConfigError, match="task `ner` is unknown"):
        predictor_for(open_trained(str(folder)), "ner", PredictOptions(), CPU)
    with pytest.raises(ConfigError, match="do not fit a model with 128 positions"):
        predictor_for(open_trained(str(folder)), None, PredictOptions(seq_len=129), CPU)
    with pytest.raises(ConfigError, match="neither a run folder nor"):
        open_trained(str(tmp_path))
    with pytest.raises(ConfigError, match="`last` is no step"):
        open_trained(f"{folder}@last")


@pytest.mark.parametrize(
    ("class_name", "fields", "reason"),
    [
        ("BertForMaskedLM", {"text": "no mask"}, r"there is no \[MASK\]"),
        ("BertForMaskedLM", {"text": "[MASK] " * 200}, "the model takes 64"),
        ("BertForQuestionAnswering", {"question": "why " * 100, "context": "x"}, "leaves no room"),
        ("GPT2LMHeadModel", {"txt": "x"}, "no field 'text'"),
        ("T5ForConditionalGeneration", {"source": 3}, "not text"),
    ],
)
def test_records_that_cannot_be_predicted_say_why(
    models: Any, class_name: str, fields: dict[str, Any], reason: str
) -> None:
    predictor = predictor_for(open_trained(str(models(class_name))), None, PredictOptions(), CPU)
    with pytest.raises(Unusable, match=reason):
        predictor.clean(fields)


def test_shares_are_contiguous_and_none_is_empty() -> None:
    def shares(count: int, ranks: int) -> list[tuple[int, int]]:
        request = Request("model", "in.jsonl", PredictOptions(batch_rows=1), ranks=ranks)
        return [(share.begin, share.end) for share in divide(request, count)]

    # Eight records are a chunk, which is not divided.
    assert shares(56, 3) == [(0, 16), (16, 32), (32, 56)]
    assert shares(9, 5) == [(0, 8), (8, 9)]
    assert shares(1, 5) == [(0, 1)]
