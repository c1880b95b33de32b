"""The manifest: what it refuses, and what its fingerprint covers."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from text_datasets import TextDataset, write_pairs

from dist_lm.data.manifest import MANIFEST_NAME, Manifest
from dist_lm.errors import DataError, EnvironmentFault

pytestmark = pytest.mark.fast

Body = dict[str, Any]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return write_pairs(tmp_path_factory.mktemp("manifest"), [40, 33])


def test_a_saved_manifest_is_loaded_unchanged(dataset: TextDataset, tmp_path: Path) -> None:
    dataset.manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == dataset.manifest
    assert Manifest.load(tmp_path).fingerprint == dataset.manifest.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def _list_a_shard_twice(body: Body) -> None:
    body["shards"].append(body["shards"][-1])
    body["num_rows"] += body["shards"][-1]["rows"]


def _exchange_shards(body: Body) -> None:
    body["shards"].reverse()


def _set(*path: Any) -> Callable[[Body], None]:
    *parents, key, value = path

    def change(body: Body) -> None:
        for parent in parents:
            body = body[parent]
        body[key] = value

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_set("format", "parquet"), "unknown format"),
        (_set("version", 2), "format version 2"),
        (_set("version", None), "format version None"),
        (_set("kind", "Images!"), "kind: String should match pattern"),
        (_set("num_rows", -73), "num_rows: Input should be greater than or equal to 0"),
        (_set("num_rows", 74), "num_rows is 74, but the shards hold 73 rows"),
        (_set("num_rows", "73"), "num_rows: Input should be a valid integer"),
        (_set("num_tokens", -1), "num_tokens"),
        (_set("surprise", 1), "surprise: Unexpected keyword argument"),
        (_set("labels", ["a", "b", "a"]), "labels: a name is listed twice"),
        (_set("shards", 0, "rows", 0), "shards.0.rows: Input should be greater than 0"),
        (_set("shards", 0, "rows", -40), "shards.0.rows"),
        (_set("shards", 0, "blocks", 4), "s-000000.tar: 40 rows in blocks of 16 are 3 blocks, not 4"),
        (_set("shards", 0, "bytes", 100), "s-000000.tar: 100 bytes are too few"),
        (_set("shards", 0, "sha256", "0123"), "shards.0.sha256"),
        (_set("shards", 0, "name", "../s-000000.tar"), "shards.0.name"),
        (_set("columns", []), "columns: there is none"),
        (_set("columns", 1, "name", "first"), "columns: 'first' is listed twice"),
        (_set("columns", 0, "name", "first.txt"), "columns.0.name"),
        (_set("columns", 0, "dtype", "object"), "columns.0.dtype"),
        (_set("columns", 0, "shape", [0]), "columns.0.shape"),
        (
            _set("columns", 0, "lengths", "nobody"),
            "the lengths of 'first' are 'nobody', which is no column of integers",
        ),
        (_set("columns", 0, "lengths", "second"), "the lengths of 'first' are 'second'"),
        (_set("columns", 4, "lengths", "first_length"), "'document' has lengths and the shape ()"),
        (_list_a_shard_twice, "s-000001.tar is listed twice"),
        (_exchange_shards, "s-000000.tar is listed after s-000001.tar"),
    ],
)
def test_a_manifest_that_does_not_add_up_is_refused(
    dataset: TextDataset, tmp_path: Path, damage: Callable[[Body], None], message: str
) -> None:
    body = json.loads((dataset.folder / MANIFEST_NAME).read_text())
    damage(body)
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(body))
    with pytest.raises(DataError) as caught:
        Manifest.load(tmp_path)
    assert message in str(caught.value)
    assert str(tmp_path / MANIFEST_NAME) in str(caught.value)


def test_a_manifest_that_does_not_add_up_is_not_saved(dataset: TextDataset, tmp_path: Path) -> None:
    for wrong in (replace(dataset.manifest, num_rows=9), replace(dataset.manifest, num_tokens=-1)):
        with pytest.raises(DataError, match=r"num_rows is 9|num_tokens"):
            wrong.save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]", b"null"])
def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(DataError, match=r"not JSON|unknown format"):
        Manifest.load(tmp_path)


def test_a_folder_whose_preparation_was_cut_off_is_no_data_set(dataset: TextDataset, tmp_path: Path) -> None:
    for path in dataset.folder.glob("s-*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / (MANIFEST_NAME + ".tmp")).write_bytes((dataset.folder / MANIFEST_NAME).read_bytes())
    with pytest.raises(DataError, match="its preparation was not finished"):
        Manifest.load(tmp_path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)nowhere.*does not exist"):
        Manifest.load(tmp_path / "nowhere")


def test_a_manifest_that_the_machine_cannot_read_is_not_blamed_on_the_data(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_NAME).symlink_to(MANIFEST_NAME)
    with pytest.raises(EnvironmentFault, match="cannot read a manifest") as caught:
        Manifest.load(tmp_path)
    assert "symbolic links" in caught.value.why


def test_the_fingerprint_covers_what_decides_the_rows_and_nothing_else(dataset: TextDataset) -> None:
    manifest = dataset.manifest
    first, second = manifest.shards
    others = [
        replace(manifest, shards=(first, replace(second, sha256=first.sha256))),
        replace(manifest, shards=(first,), num_rows=40),
        replace(manifest, tokenizer_sha256=first.sha256),
        replace(manifest, block_rows=8),
        replace(manifest, seq_len=36),
        replace(manifest, labels=("a", "b")),
        replace(manifest, columns=manifest.columns[:-1]),
    ]
    assert len({manifest.fingerprint, *(other.fingerprint for other in others)}) == len(others) + 1
    assert replace(manifest, preparation={"kept": 5}).fingerprint == manifest.fingerprint


def test_asking_for_a_column_that_is_not_there_names_those_that_are(dataset: TextDataset) -> None:
    with pytest.raises(DataError, match=r"(?s)no column 'label'.*first, second, first_length"):
        dataset.manifest.column("label")
