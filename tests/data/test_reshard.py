"""Other shards, the same rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dist_lm.data.reshard import ReshardOptions, reshard
from dist_lm.data.shards import Column, Manifest, write_shard
from dist_lm.data.verify import verify_dataset
from dist_lm.errors import ConfigError, DataError
from tests.data.preparation.preparing import columns_of, files_of
from tests.data.text_datasets import flip_bit, write_pairs

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ({"num_shards": 1}, [150]),
        ({"num_shards": 4}, [37, 38, 37, 38]),
        ({"num_shards": 150}, [1] * 150),
        ({"shard_rows": 64}, [64, 64, 22]),
        ({"shard_rows": 50, "block_rows": 7}, [50, 50, 50]),
        ({"shard_rows": 1000}, [150]),
    ],
)
def test_the_rows_are_the_same_in_the_same_order(tmp_path: Path, wanted: dict[str, Any], expected: list[int]) -> None:
    source = write_pairs(tmp_path / "source", [70, 30, 50])
    made = reshard(ReshardOptions(str(source.folder), tmp_path / "out", **wanted))
    assert list(made.shard_rows) == expected
    assert made.block_rows == wanted.get("block_rows", 16)
    assert verify_dataset(tmp_path / "out") == made
    before, after = columns_of(source.folder), columns_of(tmp_path / "out")
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


def test_a_stream_of_tokens_is_cut_behind_documents(tmp_path: Path) -> None:
    separator = 9
    documents = [[1, 2, 3, separator], [4, separator], [5] * 30 + [separator], [6, 6, separator]]
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    spec = (Column("tokens", "uint16"),)
    folder = tmp_path / "source"
    folder.mkdir()
    entry = write_shard(folder, 0, {"tokens": tokens}, spec=spec, block_rows=8)
    Manifest(
        kind="tokens",
        columns=spec,
        block_rows=8,
        seq_len=16,
        vocab_size=10,
        tokenizer_sha256="0" * 64,
        num_rows=len(tokens),
        num_tokens=len(tokens),
        shards=(entry,),
        facts={"separator_id": separator},
    ).save(folder)
    made = reshard(ReshardOptions(str(folder), tmp_path / "out", shard_rows=13))
    # The long document is longer than a shard: it is cut where it must be.
    assert list(made.shard_rows) == [6, 20, 11, 3]
    assert columns_of(tmp_path / "out")["tokens"].tolist() == tokens.tolist()


def test_run_again_it_does_nothing_and_anything_else_is_refused(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", [70, 30])
    wanted = ReshardOptions(str(source.folder), tmp_path / "out", num_shards=3)
    made = reshard(wanted)
    before = files_of(tmp_path / "out")
    assert reshard(wanted) == made
    assert files_of(tmp_path / "out") == before
    for other in (
        ReshardOptions(str(source.folder), tmp_path / "out", num_shards=2),
        ReshardOptions(str(tmp_path / "out"), source.folder, num_shards=2),
    ):
        with pytest.raises(ConfigError, match="holds another data set"):
            reshard(other)


def test_a_damaged_source_is_named_and_leaves_no_data_set(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", [70, 30])
    flip_bit(source.tar(1), 530)
    with pytest.raises(DataError) as error:
        reshard(ReshardOptions(str(source.folder), tmp_path / "out", num_shards=2))
    assert source.tar(1).name in error.value.where
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_damaged_result_is_not_taken_for_made(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", [70, 30])
    wanted = ReshardOptions(str(source.folder), tmp_path / "out", num_shards=2)
    reshard(wanted)
    flip_bit(tmp_path / "out" / "s-000001.tar", 530)
    with pytest.raises(DataError) as error:
        reshard(wanted)
    assert "Remove" in error.value.do


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({}, "either --shard-rows or --shards"),
        ({"num_shards": 2, "shard_rows": 2}, "either --shard-rows or --shards"),
        ({"num_shards": 0}, "0 is too small"),
        ({"num_shards": 101}, "100 rows cannot fill 101 shards"),
    ],
)
def test_impossible_shards_are_refused(tmp_path: Path, wanted: dict[str, Any], why: str) -> None:
    source = write_pairs(tmp_path / "source", [70, 30])
    with pytest.raises(ConfigError, match=why):
        reshard(ReshardOptions(str(source.folder), tmp_path / "out", **wanted))


def test_a_data_set_does_not_replace_itself(tmp_path: Path) -> None:
    source = write_pairs(tmp_path / "source", [70, 30])
    with pytest.raises(ConfigError, match="replaced by itself"):
        reshard(ReshardOptions(str(source.folder), source.folder, num_shards=2))
