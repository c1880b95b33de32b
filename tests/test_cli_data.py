"""The verbs about data, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.data.manifest import Manifest
from dist_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.fast


def dist_lm(*words: object) -> str:
    """Output of a command that succeeds."""
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CSV file of reviews, and a tokenizer made of it."""
    folder = tmp_path_factory.mktemp("cli")
    rows = [
        f'"{text[:300].replace(chr(34), "")}",{number % 5},{number / 7}' for number, text in enumerate(topics.values())
    ]
    (folder / "reviews.csv").write_text("\n".join(["review,stars,score", *rows]) + "\n")
    dist_lm(
        "tokenizer",
        "train",
        folder / "reviews.csv",
        "--field",
        "text=review",
        "--vocab-size",
        500,
        "--out",
        folder / "tok",
    )
    return folder


def prepare(folder: Path, out: str, *words: object) -> str:
    given = [folder / "reviews.csv", "--out", folder / out, "--tokenizer", folder / "tok", "--workers", 1]
    return dist_lm("data", "prepare", *given, "--field", "text=review", "--heldout", 0.1, *words)


def test_classes_from_a_csv_column(folder: Path) -> None:
    told = prepare(folder, "stars", "--kind", "classification", "--field", "label=stars")
    assert f"read     {len(topics)} documents read" in told
    assert Manifest.load(folder / "stars" / "train").labels == ("0", "1", "2", "3", "4")
    assert "up to date" in prepare(folder, "stars", "--kind", "classification", "--field", "label=stars")


def test_regression_wants_an_option_and_says_so(folder: Path) -> None:
    words = ("--kind", "classification", "--field", "label=score")
    with pytest.raises(DataError, match="the labels are numbers") as error:
        prepare(folder, "score", *words)
    assert "--option labels=number" in error.value.do
    prepare(folder, "score", *words, "--option", "labels=number")
    manifest = Manifest.load(folder / "score" / "train")
    assert manifest.facts["problem_type"] == "regression"
    assert manifest.column("target").dtype == "float32"


def test_a_second_text_is_used_when_its_field_is_named(folder: Path) -> None:
    prepare(folder, "pair", "--kind", "classification", "--field", "label=stars", "--field", "text_pair=review")
    assert Manifest.load(folder / "pair" / "train").column("second").lengths == "second_length"


def test_filters_and_documents_are_counted(folder: Path) -> None:
    told = prepare(folder, "filtered", "--kind", "tokens", "--filter", "min_characters=299")
    assert "documents beyond min_characters" in told


def test_a_file_of_lines_in_a_folder_without_suffixes(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "part-0001").write_text("\n".join(text.splitlines()[0] for text in topics.values()))
    words = (
        "--tokenizer",
        folder / "tok",
        "--kind",
        "tokens",
        "--format",
        "text",
        "--documents",
        "line",
        "--workers",
        1,
    )
    told = dist_lm("data", "prepare", tmp_path, "--out", tmp_path / "data", *words)
    lines = (tmp_path / "part-0001").read_text().splitlines()
    assert f"read     {len([line for line in lines if line.strip()])} documents read" in told


def test_reshard_and_verify(folder: Path) -> None:
    prepare(folder, "one", "--kind", "classification", "--field", "label=stars")
    assert "in 4 shards" in dist_lm(
        "data", "reshard", folder / "one" / "train", "--out", folder / "four", "--shards", 4
    )
    assert "in 4 shards" in dist_lm("data", "verify", folder / "four")


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--field", "text"), "`text` is no pair"),
        (("--filter", "min_characters=long"), "`long` is no number"),
        (("--columns", "1"), "`1` are no two columns"),
        (("--documents", "page"), "documents `page`"),
        (("--kind", "pears"), "kind `pears`"),
        (("--format", "word"), "format `word`"),
    ],
)
def test_a_flag_that_makes_no_sense_is_refused(folder: Path, words: tuple[str, str], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        prepare(folder, "refused", *words)


def test_a_corpus_becomes_a_classification_task(tmp_path: Path) -> None:
    lines = [{"text": f"{package} {number} " + "x" * 90, "package": package} for package in "ab" for number in range(5)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ("--packages", 2, "--per-package", 3, "--out", tmp_path / "task.jsonl")
    assert "a 3, b 3" in dist_lm("data", "corpus", "packages", tmp_path / "corpus.jsonl", *words)
    assert len((tmp_path / "task.jsonl").read_text().splitlines()) == 6


def test_the_mixture_of_a_run_is_told_with_shares_and_epochs(folder: Path) -> None:
    for name, seq_len in (("long", 64), ("short", 32)):
        prepare(folder, name, "--kind", "tokens", "--seq-len", seq_len)
    rows = Manifest.load(folder / "long" / "train").num_rows // 16
    config = folder / "mixed.yaml"
    config.write_text(f"""\
task: {{name: causal_lm}}
model: {{from: gpt2}}
data:
  train:
    - {{path: {folder}/long/train, weight: 3}}
    - {{path: {folder}/short/train, weight: 1}}
  stages: [{{from_step: 2, weights: {{long: 1}}}}]
  tokenizer: {folder}/tok
  seq_len: 16
  lanes: 4
batch: {{global: 4096, micro: 8}}
optim: {{lr: 1e-4}}
run: {{dir: runs/x, steps: 2}}
""")
    # A step is one block of each lane, so the shares are exact: 3 of 4 in the first step, 1 of 2 in the second.
    assert dist_lm("data", "mixture", "-c", config).splitlines() == [
        f"2 steps of 4096 rows: {2 * 4096 * 16} tokens",
        f"long: {rows} rows, {rows * 16} tokens; 62.5% of what is read, {5120 / rows:.2f} epochs  "
        f"({folder}/long/train)",
        f"short: {rows} rows, {rows * 16} tokens; 37.5% of what is read, {3072 / rows:.2f} epochs  "
        f"({folder}/short/train)",
        "from step 1: long 75.0%, short 25.0% of the tokens",
        "from step 2: long 50.0%, short 50.0% of the tokens",
    ]
    alone = dist_lm("data", "mixture", "-c", config, f"data.train={folder}/long/train", "data.stages=[]")
    assert f"100.0% of what is read, {8192 / rows:.2f} epochs" in alone
