"""Every kind from files in the format that its users have: the rows are those of packing all records at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.shards import Manifest
from dist_lm.data.sources.format import ReadSettings
from dist_lm.data.sources.inputs import read_records
from dist_lm.data.sources.record import BadRecords
from dist_lm.data.tokenizer import Tokenizer
from tests.data.preparation.preparing import SMALL, TEXTS, columns_of, expected_rows, rows_of

pytestmark = pytest.mark.fast


def conll() -> str:
    sentences = [text.split()[:12] for text in TEXTS]
    tags = ("O", "B-X", "I-X")
    # Every second sentence has entities: begun at each place 1, 4, 7, ... and one token longer.
    return "\n\n".join(
        "\n".join(f"{token} {tags[place % 3 if number % 2 else 0]}" for place, token in enumerate(sentence))
        for number, sentence in enumerate(sentences)
    )


def squad() -> str:
    paragraphs = []
    for number, text in enumerate(TEXTS[:150]):
        word = text.split()[5]
        answers = [{"text": word, "answer_start": text.index(word)}] if number % 4 else []
        question = {"id": str(number), "question": f"What is number {number}?", "answers": answers}
        paragraphs.append({"context": text, "qas": [question]})
    return json.dumps({"data": [{"paragraphs": paragraphs[:70]}, {"paragraphs": paragraphs[70:]}]})


def translations() -> str:
    return "".join(json.dumps({"translation": {"en": text[:200], "up": text[:200].upper()}}) + "\n" for text in TEXTS)


CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "token_classification": ("a.conll", conll(), {}),
    "question_answering": ("a.json", squad(), {}),
    "seq2seq": ("a.jsonl", translations(), {"fields": {"source": "translation.en", "target": "translation.up"}}),
}


@pytest.mark.parametrize("kind", CASES)
def test_the_rows_are_those_of_packing_everything_at_once(kind: str, tokenizer: Tokenizer, tmp_path: Path) -> None:
    name, content, given = CASES[kind]
    (tmp_path / name).write_text(content)
    settings = ReadSettings(**given)
    made = PrepareOptions(
        inputs=[str(tmp_path / name)],
        out=tmp_path / "data",
        tokenizer=tokenizer.path,
        kind=kind,
        seq_len=96,
        heldout_fraction=0.1,
        settings=settings,
        **SMALL,
    )
    prepare(made)
    records = [dict(record.fields) for record in read_records(made.inputs, settings, BadRecords())]
    unique = list({json.dumps(record, sort_keys=True): record for record in records}.values())
    spec = Manifest.load(made.out / "train").columns
    rows = [row for split in ("train", "heldout") for row in rows_of(columns_of(made.out / split), spec)]
    assert len(rows) >= 150
    assert sorted(rows) == sorted(expected_rows(unique, made, tokenizer))
