"""Records of public data sets as .jsonl: what bench/quality.py trains and judges on.

Enters: files as they are distributed, gzipped or not.  Leaves: FOLDER/train.jsonl, FOLDER/test.jsonl,
and the texts that a tokenizer is trained on.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def lines_of(path: str) -> Iterator[str]:
    content = Path(path).read_bytes()
    text = (gzip.decompress(content) if path.endswith(".gz") else content).decode("utf-8")
    yield from text.split("\n")


def sst2(paths: list[str]) -> tuple[Records, Records]:
    """Lines of `LABEL text`."""

    def records(path: str) -> Records:
        pairs = (line.split(" ", 1) for line in lines_of(path) if line)
        return [{"text": text, "label": {"0": "negative", "1": "positive"}[label]} for label, text in pairs]

    return records(paths[0]), records(paths[1])


def ner(paths: list[str]) -> tuple[Records, Records]:
    """Lines of `en:WORD<tab>TAG`, a blank line behind each sentence (WikiANN)."""

    def records(path: str) -> Records:
        found: Records = []
        words: list[str] = []
        tags: list[str] = []
        for line in [*lines_of(path), ""]:
            if line.strip():
                word, tag = line.split("\t")[:2]
                words.append(word.split(":", 1)[1] or ":")
                tags.append(tag)
            elif words:
                found.append({"tokens": words, "tags": tags})
                words, tags = [], []
        return found

    return records(paths[0]), records(paths[1])


def qa(paths: list[str]) -> tuple[Records, Records]:
    """SQuAD's layout; every fourth article is for the test."""
    articles = json.loads("\n".join(lines_of(paths[0])))["data"]

    def records(chosen: Iterable[dict[str, Any]]) -> Records:
        return [
            {"id": item["id"], "question": item["question"], "context": part["context"], "answers": item["answers"]}
            for article in chosen
            for part in article["paragraphs"]
            for item in part["qas"]
        ]

    return (
        records(article for number, article in enumerate(articles) if number % 4),
        records(article for number, article in enumerate(articles) if not number % 4),
    )


def translation(paths: list[str]) -> tuple[Records, Records]:
    """Source and target of the training part, then of the test."""

    def records(source: str, target: str) -> Records:
        pairs = zip(lines_of(source), lines_of(target), strict=True)
        return [{"source": first, "target": second} for first, second in pairs if first.strip() and second.strip()]

    return records(paths[0], paths[1]), records(paths[2], paths[3])


def wikitext(paths: list[str]) -> tuple[Records, Records]:
    """A paragraph a line; headings and empty lines are left out."""

    def records(path: str) -> Records:
        texts = (line.strip() for line in lines_of(path))
        return [{"text": text} for text in texts if len(text.split()) > 1 and not text.startswith("=")]

    return records(paths[0]), records(paths[1])


def texts_of(records: Records) -> Iterator[str]:
    for record in records:
        for value in record.values():
            if isinstance(value, str):
                yield value
            elif isinstance(value, list) and value and isinstance(value[0], str):
                yield " ".join(value)


def write(path: Path, records: Records) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
