"""A look into data sets of every kind; `data verify` with a tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from http_server import serving

from dist_lm.cli import main
from dist_lm.data.inspect import decoded_rows, inspect_dataset
from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.tokenizer import load_tokenizer, train_tokenizer

pytestmark = pytest.mark.fast

TEXTS = {
    "pairs": [{"text": "the cat sat on the mat. " * count} for count in range(3, 9)],
    "tokens": [{"text": "the cat sat on the mat " * count} for count in (2, 5, 9)],
    "classification": [{"text": f"the cat {n}", "label": "odd" if n % 2 else "even"} for n in range(7)],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    train_tokenizer(["the cat sat on the mat. 0 1 2 3 4 5 6"], vocab_size=200, out=folder / "tokenizer")
    train_tokenizer(["a dog lay under the table"], vocab_size=200, out=folder / "other")
    for kind, records in TEXTS.items():
        source = folder / f"{kind}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        options = PrepareOptions(
            [str(source)], folder / kind, folder / "tokenizer", kind=kind, seq_len=32, heldout_fraction=0.0, workers=1
        )
        prepare(options)
    return folder


def test_documents_of_a_stream_of_tokens_are_told_apart(folder: Path) -> None:
    texts = {text for text, _ in decoded_rows(folder / "tokens" / "train", folder / "tokenizer")}
    assert texts == {record["text"].strip() for record in TEXTS["tokens"]}
    shown = inspect_dataset(folder / "tokens" / "train", folder / "tokenizer")
    assert "kind tokens, 3 documents" in shown
    encoded = load_tokenizer(folder / "tokenizer").encode_batch(sorted(texts))
    assert f"{sum(map(len, encoded)) + 3} tokens" in shown, "and a separator behind each document"


def test_rows_have_their_text_and_label(folder: Path) -> None:
    rows = dict(decoded_rows(folder / "classification" / "train", folder / "tokenizer"))
    assert rows == {record["text"]: record["label"] for record in TEXTS["classification"]}
    shown = inspect_dataset(folder / "classification" / "train", folder / "tokenizer", show=1)
    assert "label  even: 4" in shown
    assert "label  odd: 3" in shown
    assert shown.count("sample ") == 1


def test_documents_of_pairs_are_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["data", "inspect", str(folder / "pairs" / "train"), "--tokenizer", str(folder / "tokenizer")])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert "of 6 documents" in shown
    assert "the cat sat on the mat" in shown


def test_a_data_set_behind_a_web_server_shows_the_same(folder: Path) -> None:
    with serving(folder) as server:
        remote = inspect_dataset(f"{server.url}/tokens/train", folder / "tokenizer")
        url = f"{server.url}/tokens/train"
    assert remote.replace(url, "") == inspect_dataset(folder / "tokens" / "train", folder / "tokenizer").replace(
        str(folder / "tokens" / "train"), ""
    )
    assert remote.startswith(f"{url}: kind tokens, 3 documents")


@pytest.mark.parametrize("kind", TEXTS)
def test_verify_compares_the_tokenizer_too(folder: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    data = str(folder / kind / "train")
    for tokenizer, exit_code, said in [("tokenizer", 0, "ok: "), ("other", 3, "prepared with another tokenizer")]:
        with pytest.raises(SystemExit) as ended:
            main(["data", "verify", data, "--tokenizer", str(folder / tokenizer)])
        assert ended.value.code == exit_code
        output = capsys.readouterr()
        assert said in output.out + output.err
