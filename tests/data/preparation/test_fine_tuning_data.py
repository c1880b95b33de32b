"""Preparation of the fine-tuning kinds, from files to rows."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from sklearn.utils.class_weight import compute_class_weight

from dist_lm.assemble import check_heldout, open_training_set
from dist_lm.config import RunConfig, Task
from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.kinds.chat import DEFAULT_TEMPLATE
from dist_lm.data.manifest import Manifest
from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.data.views import view_of
from dist_lm.errors import ConfigError, DataError
from dist_lm.tasks.classification import class_weights
from dist_lm.tasks.registry import build_task

pytestmark = pytest.mark.fast


def prepared(topics_data: Path, folder: Path, kind: str, records: list[dict[str, Any]], **options: Any) -> Path:
    folder.mkdir()
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    prepare(
        PrepareOptions(
            inputs=[str(folder / "in.jsonl")], out=folder / "data", tokenizer=topics_data / "tokenizer", kind=kind,
            seq_len=48, heldout_fraction=0.25, workers=1, kind_options=options,
        )
    )  # fmt: skip
    return folder / "data"


def rows_of(folder: Path) -> dict[str, Any]:
    whole = HeldoutRows(str(folder), rank=0, world_size=1, micro_rows=Manifest.load(folder).num_rows)
    rows = next(iter(whole))
    return rows.columns


def test_dialogues_share_rows_and_held_out_ones_stay_apart(topics_data: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"name number {n}", "response": f"it is {n}"} for n in range(40)]
    data = prepared(topics_data, tmp_path / "work", "instruction", [*records, records[0]])
    tokenizer = load_tokenizer(topics_data / "tokenizer")
    answers: dict[str, set[str]] = {}
    for split in ("train", "heldout"):
        columns = rows_of(data / split)
        found = set()
        for ids, answer, segment in zip(columns["tokens"], columns["answer"], columns["segment"], strict=True):
            for number in range(1, segment.max() + 1):
                found.add(tokenizer.text_of(ids[(segment == number) & (answer > 0)]))
        answers[split] = found
        assert columns["segment"].max() > 1
        manifest = Manifest.load(data / split)
        assert manifest.num_rows < len(found)
        assert manifest.num_tokens == int(columns["length"].sum())
        assert manifest.facts["chat_template"]
    assert not answers["train"] & answers["heldout"]
    # The duplicate is dropped; nothing else is.
    assert len(answers["train"]) + len(answers["heldout"]) == 40


@pytest.mark.parametrize("kind", ["classification", "token_classification"])
def test_balanced_weights_are_those_of_scikit_learn(topics_data: Path, tmp_path: Path, kind: str) -> None:
    if kind == "classification":
        records = [{"text": f"word{n}", "label": "rare" if n % 7 == 0 else "often"} for n in range(60)]
    else:
        records = [{"tokens": [f"word{n}", "is", "x"], "tags": ["B-X" if n % 3 else "O", "O", "O"]} for n in range(60)]
    data = prepared(topics_data, tmp_path / "work", kind, records)
    view = view_of(Manifest.load(data / "train"), None)
    settings = TypeAdapter(Task).validate_python({"name": kind, "class_weights": "balanced"})
    task = build_task(settings, load_tokenizer(topics_data / "tokenizer"), view, 1)
    columns = rows_of(data / "train")
    if kind == "classification":
        truth = columns["label"]
    else:
        truth = np.concatenate([tags[:count] for tags, count in zip(columns["tag"], columns["num_words"], strict=True)])
    expected = compute_class_weight("balanced", classes=np.arange(len(view.manifest.labels)), y=truth)
    assert expected.max() > 1.5
    np.testing.assert_allclose(task.weights_C.numpy(), expected, rtol=1e-6)


def test_balanced_weights_need_counts_in_the_manifest() -> None:
    manifest = Manifest("classification", (), 1, 1, 10, "0" * 64, 0, 0, (), labels=("bad", "good"))
    assert class_weights({"good": 2.0}, manifest) is not None
    with pytest.raises(DataError, match="does not tell how often each label stands"):
        class_weights("balanced", manifest)


@pytest.mark.parametrize("changed", ["template", "token"])
def test_another_chat_template_is_another_data_set(topics_data: Path, tmp_path: Path, changed: str) -> None:
    tokenizer = shutil.copytree(topics_data / "tokenizer", tmp_path / "tokenizer")
    source = tmp_path / "in.jsonl"
    source.write_text("".join(f'{{"prompt": "name {n}", "response": "it is {n}"}}\n' for n in range(9)))
    options = PrepareOptions(
        inputs=[str(source)],
        out=tmp_path / "data",
        tokenizer=tokenizer,
        kind="instruction",
        seq_len=48,
        workers=1,
        heldout_fraction=0.0,
    )
    prepare(options)
    assert prepare(options).up_to_date
    if changed == "template":
        (tokenizer / "chat_template.jinja").write_text(DEFAULT_TEMPLATE.replace("###", "##"))
    else:
        config = json.loads((tokenizer / "tokenizer_config.json").read_text())
        (tokenizer / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "[CLS]"}))
    with pytest.raises(ConfigError, match=r"facts\.chat_t"):
        prepare(options)


@pytest.mark.parametrize(
    ("kind", "record", "options", "facts"),
    [
        ("token_classification", {"tokens": ["John", "WORD"], "tags": ["B-PER", "O"]}, {}, {}),
        (
            "question_answering",
            {"question": "who?", "context": "John WORD", "answers": {"text": ["John"], "answer_start": [0]}},
            {"doc_stride": 12},
            {"doc_stride": 12},
        ),
        ("seq2seq", {"source": "a WORD", "target": "b"}, {"prefix": "turn: "}, {"prefix": "turn: ", "target_len": 48}),
    ],
)
def test_rows_and_facts_reach_the_data_set(
    topics_data: Path, tmp_path: Path, kind: str, record: dict[str, Any], options: dict[str, Any], facts: dict[str, Any]
) -> None:
    records = [json.loads(json.dumps(record).replace("WORD", f"word{n}")) for n in range(20)]
    data = prepared(topics_data, tmp_path / "work", kind, records, **options)
    train, heldout = (Manifest.load(data / split) for split in ("train", "heldout"))
    assert train.num_rows + heldout.num_rows == 20
    assert train.facts == facts
    assert train.labels == (("B-PER", "O") if kind == "token_classification" else ())
    columns = rows_of(data / "train")
    if kind == "token_classification":
        assert (columns["tag"][:, :2] == np.array([0, 1])).all()


GOOD: dict[str, dict[str, Any]] = {
    "classification": {"text": "a WORD", "label": "x"},
    "token_classification": {"tokens": ["John", "WORD"], "tags": ["B-PER", "O"]},
    "question_answering": {
        "question": "who?",
        "context": "John WORD",
        "answers": {"text": ["John"], "answer_start": [0]},
    },
    "seq2seq": {"source": "a WORD", "target": "b"},
    "instruction": {"prompt": "a WORD", "response": "b"},
}


@pytest.mark.parametrize(
    ("kind", "change", "reason"),
    [
        ("classification", {"label": None}, "field 'label'"),
        ("classification", {"label": 0.25}, "a class has a name"),
        ("token_classification", {"tags": ["I-PER", "O"]}, "an entity begins with B-"),
        ("token_classification", {"tags": ["O"]}, "1 tags for 2 tokens"),
        ("question_answering", {"answers": {"text": ["Jane"], "answer_start": [0]}}, "nowhere in it"),
        ("seq2seq", {"target": 3}, "not text"),
        ("instruction", {"response": None}, "nothing to learn"),
    ],
)
def test_a_bad_record_is_named_with_its_line_or_counted_within_the_budget(
    topics_data: Path, tmp_path: Path, kind: str, change: dict[str, Any], reason: str
) -> None:
    records = [json.loads(json.dumps(GOOD[kind]).replace("WORD", f"word{n}")) for n in range(12)]
    if kind == "classification":
        records[0]["label"] = "y"
    records[4] |= change
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    options = PrepareOptions(
        inputs=[str(source)], out=tmp_path / "data", tokenizer=topics_data / "tokenizer", kind=kind, seq_len=96,
        heldout_fraction=0.0, workers=1,
    )  # fmt: skip
    with pytest.raises(DataError) as refused:
        prepare(options)
    assert f"{source}:5" in str(refused.value)
    assert reason in str(refused.value)
    report = prepare(replace(options, max_bad=1))
    assert report.counts["bad records"] == 1
    assert report.counts["documents kept"] == 11


def test_held_out_rows_with_other_labels_are_refused(topics_data: Path, tmp_path: Path) -> None:
    for part, second in (("train", "y"), ("other", "z")):
        records = [{"text": f"word{n}", "label": second if n % 2 else "x"} for n in range(60)]
        prepared(topics_data, tmp_path / part, "classification", records)
    config = RunConfig.model_validate(
        {
            "task": {"name": "classification"},
            "data": {
                "train": str(tmp_path / "train" / "data" / "train"),
                "heldout": str(tmp_path / "other" / "data" / "heldout"),
                "tokenizer": str(topics_data / "tokenizer"),
            },
            "batch": {"global": 8, "micro": 8},
            "optim": {"lr": 1e-3},
            "run": {"dir": str(tmp_path / "run"), "steps": 1},
        }
    )
    tokenizer, data = load_tokenizer(topics_data / "tokenizer"), open_training_set(config)
    with pytest.raises(DataError, match="different labels"):
        check_heldout(config, data, tokenizer)
