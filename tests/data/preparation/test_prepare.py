"""What preparation makes of text: every row once, in an order and in bytes that depend on the content alone."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest

from dist_lm.data.preparation.map_task import document_keys
from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.shards import Manifest
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError, DataError, EnvironmentFault
from tests.data.preparation.preparing import (
    TEXTS,
    columns_of,
    expected_rows,
    files_of,
    options,
    rows_of,
    write_lines,
)
from tests.data.text_datasets import flip_bit

pytestmark = pytest.mark.fast
RECORDS = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with duplicates far from each other, and empty ones."""
    records = [*RECORDS, *RECORDS[:40], {"text": ""}, {"text": " \n"}]
    return write_lines(tmp_path_factory.mktemp("source") / "texts.jsonl", records)


@pytest.fixture(scope="module")
def pairs(source: Path, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> PrepareOptions:
    """A finished preparation of kind `pairs`."""
    made = options(source, tokenizer, tmp_path_factory.mktemp("pairs") / "data")
    prepare(made)
    return made


def all_rows(out: Path) -> list[tuple[Any, ...]]:
    spec = Manifest.load(out / "train").columns
    return [row for name in ("train", "heldout") for row in rows_of(columns_of(out / name), spec)]


def test_the_data_sets_hold_every_row_once(pairs: PrepareOptions, tokenizer: Tokenizer) -> None:
    assert sorted(all_rows(pairs.out)) == sorted(expected_rows(RECORDS, pairs, tokenizer))
    train = Manifest.load(pairs.out / "train")
    assert len(train.shards) > 3
    assert max(train.shard_rows) <= 400
    assert not list(pairs.out.glob(".work*"))


def test_a_document_is_in_one_of_the_sets_only(pairs: PrepareOptions) -> None:
    train, heldout = (set(columns_of(pairs.out / name)["document"].tolist()) for name in ("train", "heldout"))
    assert not train & heldout
    assert 0.05 < len(heldout) / len(train | heldout) < 0.2


def test_every_document_is_accounted_for(pairs: PrepareOptions) -> None:
    counts = Manifest.load(pairs.out / "train").preparation["counts"]
    assert counts["documents read"] == len(TEXTS) + 42
    assert counts["duplicate documents"] == 40
    assert counts["empty documents"] == 2
    assert counts["documents kept"] == len(TEXTS)
    assert counts == Manifest.load(pairs.out / "heldout").preparation["counts"]


@pytest.mark.parametrize(
    "settings",
    [
        {"split_bytes": 10**9, "part_bytes": 10**9},
        {"split_bytes": 3_000, "part_bytes": 1},
        {"max_bad": 7},
    ],
)
def test_how_the_work_is_divided_changes_no_byte(
    pairs: PrepareOptions, tmp_path: Path, settings: dict[str, Any]
) -> None:
    prepare(dataclasses.replace(pairs, out=tmp_path / "again", **settings))
    assert files_of(tmp_path / "again") == files_of(pairs.out)


def test_the_order_of_the_input_and_its_files_change_no_row(
    pairs: PrepareOptions, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    folder = tmp_path / "inputs"
    folder.mkdir()
    write_lines(folder / "b.jsonl", RECORDS[:100])
    write_lines(folder / "a.jsonl", RECORDS[100:])
    other = options(folder, tokenizer, tmp_path / "data")
    prepare(other)
    assert all_rows(other.out) == all_rows(pairs.out)


@pytest.mark.parametrize("bucket_bytes", [40_000, 10**9])
def test_the_number_of_buckets_changes_no_row_and_no_set(
    pairs: PrepareOptions, tmp_path: Path, bucket_bytes: int
) -> None:
    other = dataclasses.replace(pairs, out=tmp_path / "data", bucket_bytes=bucket_bytes)
    prepare(other)
    spec = Manifest.load(other.out / "train").columns
    for name in ("train", "heldout"):
        mine, theirs = (rows_of(columns_of(out / name), spec) for out in (other.out, pairs.out))
        assert sorted(mine) == sorted(theirs)


@pytest.mark.parametrize("bucket_bytes", [40_000, 10**9])
def test_documents_of_a_stream_lie_in_the_order_of_one_global_shuffle(
    source: Path, tokenizer: Tokenizer, tmp_path: Path, bucket_bytes: int
) -> None:
    made = options(
        source,
        tokenizer,
        tmp_path / "data",
        kind="tokens",
        heldout_fraction=0.0,
        shard_rows=20_000,
        block_rows=512,
        bucket_bytes=bucket_bytes,
    )
    prepare(made)
    manifest = Manifest.load(made.out / "train")
    assert len(manifest.shards) > 3
    assert manifest.facts == {"separator_id": tokenizer.separator_id}
    tokens = columns_of(made.out / "train")["tokens"].tolist()
    assert len(tokens) == manifest.num_tokens == manifest.num_rows
    low = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest()[:8], "little") for text in TEXTS]
    shuffled = np.argsort(document_keys(np.array(low, dtype=np.uint64), made.seed), kind="stable")
    expected = tokenizer.encode_batch([TEXTS[place] for place in shuffled])
    assert tokens == [token for ids in expected for token in [*ids, tokenizer.separator_id]]
    # Every shard begins with a document.
    starts = np.cumsum((0, *manifest.shard_rows))[:-1]
    assert all(start == 0 or tokens[start - 1] == tokenizer.separator_id for start in starts)


def test_another_seed_gives_the_same_rows_in_another_order(pairs: PrepareOptions, tmp_path: Path) -> None:
    other = dataclasses.replace(pairs, out=tmp_path / "data", seed=1)
    prepare(other)
    assert all_rows(other.out) != all_rows(pairs.out)
    assert sorted(all_rows(other.out)) == sorted(all_rows(pairs.out))


def test_the_labels_of_all_splits_are_numbered_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"text": text, "label": f"class {number % 7}"} for number, text in enumerate(TEXTS)]
    source = write_lines(tmp_path / "labelled.jsonl", records)
    made = options(source, tokenizer, tmp_path / "data", kind="classification", split_bytes=5_000)
    prepare(made)
    manifest = Manifest.load(made.out / "heldout")
    assert manifest.labels == tuple(f"class {number}" for number in range(7))
    assert manifest.labels == Manifest.load(made.out / "train").labels
    # All at once there is one list of labels, the sorted one.
    assert sorted(all_rows(made.out)) == sorted(expected_rows(records, made, tokenizer))


def test_many_labels_a_text_are_numbered_together(tokenizer: Tokenizer, tmp_path: Path) -> None:
    records = [{"text": text, "label": [f"l{number % 5}", f"l{number % 3}"]} for number, text in enumerate(TEXTS)]
    source = write_lines(tmp_path / "labelled.jsonl", records)
    many = {"labels": "many"}
    made = options(source, tokenizer, tmp_path / "data", kind="classification", kind_options=many, split_bytes=5_000)
    prepare(made)
    assert sorted(all_rows(made.out)) == sorted(expected_rows(records, made, tokenizer))


def test_prepared_again_nothing_is_done(pairs: PrepareOptions) -> None:
    before = {path: path.stat().st_ino for path in pairs.out.rglob("*.*")}
    report = prepare(pairs)
    assert report.up_to_date
    assert "up to date" in str(report)
    assert {path: path.stat().st_ino for path in pairs.out.rglob("*.*")} == before


@pytest.mark.parametrize(
    ("change", "told"), [({"seq_len": 64}, "seq_len: 48 -> 64"), ({"filters": {"min_characters": 9.0}}, "filters")]
)
def test_a_data_set_with_other_options_is_not_replaced(
    pairs: PrepareOptions, change: dict[str, Any], told: str
) -> None:
    before = files_of(pairs.out)
    with pytest.raises(ConfigError, match="with other options") as error:
        prepare(dataclasses.replace(pairs, **change))
    assert told in error.value.why
    assert files_of(pairs.out) == before


def test_a_data_set_of_other_inputs_is_not_replaced(pairs: PrepareOptions, tmp_path: Path) -> None:
    other = write_lines(tmp_path / "other.jsonl", RECORDS[1:])
    with pytest.raises(ConfigError, match="made of other inputs"):
        prepare(dataclasses.replace(pairs, inputs=[str(other)]))


def test_a_damaged_data_set_is_prepared_again_to_the_same_bytes(
    source: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    made = options(source, tokenizer, tmp_path / "data")
    prepare(made)
    before = files_of(made.out)
    shard = made.out / "train" / Manifest.load(made.out / "train").shards[1].name
    flip_bit(shard, 700)
    assert files_of(made.out) != before
    assert not prepare(made).up_to_date
    assert files_of(made.out) == before


def test_two_preparations_do_not_work_in_one_folder(pairs: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (
        filelock.FileLock(tmp_path / "data" / ".prepare.lock"),
        pytest.raises(ConfigError, match="another preparation"),
    ):
        prepare(dataclasses.replace(pairs, out=tmp_path / "data"))


def test_filters_drop_and_count(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    limits = {"min_characters": 200.0, "max_document_tokens": 500.0}
    made = options(source, tokenizer, tmp_path / "data", filters=limits)
    report = prepare(made)
    long = [text for text in TEXTS if len(text) >= 200]
    kept = [text for text, ids in zip(long, tokenizer.encode_batch(long), strict=True) if len(ids) <= 500]
    assert 0 < len(kept) < len(long) < len(TEXTS)
    assert report.counts["documents kept"] == len(kept)
    assert sorted(all_rows(made.out)) == sorted(expected_rows([{"text": text} for text in kept], made, tokenizer))
    dropped = sum(
        count for name, count in report.counts.items() if name.startswith(("documents beyond", "dupl", "empt"))
    )
    assert report.counts["documents read"] == len(kept) + dropped


def refusals(folder: Path) -> dict[str, tuple[list[Any], dict[str, Any], type[Exception], str]]:
    label = {"kind": "classification"}
    return {
        "empty input": ([], {}, DataError, "the input files are empty"),
        "blank lines": ([{"text": ""}], {}, DataError, "no row is left for train"),
        "all bad": ([{"body": "x"}], {"max_bad": 3}, DataError, "no usable record"),
        "too many bad": ([{"body": "x"}] * 3, {"max_bad": 2}, DataError, "3 bad records, and 2 are allowed"),
        "no label": ([{"text": "x"}], label, DataError, "1 bad record"),
        "a label with a fraction": ([{"text": "x", "label": 0.5}], label, DataError, "1 bad record"),
        "numbers as text": ([{"text": "x", "label": "0.5"}], label, DataError, "the labels are numbers"),
        "all filtered": ([{"text": "x"}], {"filters": {"min_characters": 9}}, DataError, "no row is left for train"),
        "one document": ([{"text": TEXTS[0]}], {"heldout_fraction": 0.5}, DataError, "no row is left for"),
        "unknown kind": ([], {"kind": "pears"}, ConfigError, "kind `pears`"),
        "unknown filter": ([], {"filters": {"min_fun": 1}}, ConfigError, "filter `min_fun`"),
        "impossible filter": (
            [],
            {"filters": {"min_characters": 9, "max_characters": 3}},
            ConfigError,
            "min_characters=9",
        ),
        "unknown option": ([{"text": "x"}], {"kind_options": {"sauce": 1}}, ConfigError, "no option `sauce`"),
        "share": ([], {"heldout_fraction": 1.0}, ConfigError, "share of 1.0"),
        "short rows": ([], {"seq_len": 4}, ConfigError, "rows of 4 tokens"),
        "no rows": ([], {"shard_rows": 0}, ConfigError, "0 rows"),
        "a URL": ([], {"out": Path("s3://bucket/x")}, ConfigError, "not to URLs"),
    }


@pytest.mark.parametrize("case", refusals(Path()))
def test_what_cannot_be_prepared_is_refused(tokenizer: Tokenizer, tmp_path: Path, case: str) -> None:
    records, settings, error_type, message = refusals(tmp_path)[case]
    source = write_lines(tmp_path / "source.jsonl", records)
    with pytest.raises(error_type, match=message):
        prepare(options(source, tokenizer, settings.pop("out", tmp_path / "data"), **settings))
    assert not list((tmp_path / "data").rglob("manifest.json"))


def test_a_file_in_the_place_of_a_folder_is_refused(pairs: PrepareOptions, tmp_path: Path) -> None:
    (tmp_path / "data").write_text("a file")
    with pytest.raises(EnvironmentFault) as error:
        prepare(dataclasses.replace(pairs, out=tmp_path / "data"))
    assert error.value.where == str(tmp_path / "data")
    with pytest.raises(DataError, match="tokenizer"):
        prepare(dataclasses.replace(pairs, out=tmp_path / "other", tokenizer=tmp_path / "data"))


def test_after_a_refusal_the_corrected_command_works(tokenizer: Tokenizer, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "source.jsonl", [*RECORDS, {"body": "x"}])
    made = options(source, tokenizer, tmp_path / "data")
    with pytest.raises(DataError, match="1 bad record"):
        prepare(made)
    assert prepare(dataclasses.replace(made, max_bad=1)).counts["bad records"] == 1
    calm = options(source, tokenizer, tmp_path / "calm", max_bad=1)
    prepare(calm)
    assert files_of(made.out) == files_of(calm.out)


def test_what_an_abandoned_preparation_left_is_removed(source: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    stale = tmp_path / "data" / "train" / "s-000999.tar"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"of another preparation")
    (tmp_path / "data" / ".work-0123456789ab" / "map").mkdir(parents=True)
    made = options(source, tokenizer, tmp_path / "data")
    prepare(made)
    assert not stale.exists()
    assert not list(made.out.glob(".work*"))


def test_a_document_longer_than_a_block_and_a_bucket_is_kept_whole(tokenizer: Tokenizer, tmp_path: Path) -> None:
    long = "\n".join(TEXTS)
    source = write_lines(tmp_path / "long.jsonl", [{"text": long}, *RECORDS[:5]])
    made = options(
        source, tokenizer, tmp_path / "data", kind="tokens", heldout_fraction=0.0, block_rows=64, shard_rows=1000
    )
    prepare(made)
    tokens = columns_of(made.out / "train")["tokens"].tolist()
    separators = [place for place, token in enumerate(tokens) if token == tokenizer.separator_id]
    lengths = np.diff([-1, *separators]) - 1
    assert int(lengths.max()) == len(tokenizer.encode_batch([long])[0])
    assert len(separators) == 6
