"""Inputs behind URLs: in memory through fsspec, and on a real web server."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

import fsspec
import pytest

from dist_lm.data.sources.files import content_key
from dist_lm.data.sources.format import ReadSettings
from dist_lm.data.sources.inputs import format_of, list_inputs, read_split, read_texts
from dist_lm.data.sources.record import BadRecords, TooManyBad
from dist_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.fast
LINES = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(20))
TEXTS = [f"text {number}" for number in range(20)]


@pytest.fixture
def bucket() -> Iterator[str]:
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/a.jsonl", LINES.encode())
    files.pipe("/bucket/sub/b.jsonl.gz", gzip.compress(LINES.encode()))
    files.pipe("/bucket/notes.md", b"no data")
    yield "fsspec+memory://bucket"
    files.rm("/bucket", recursive=True)


def test_a_folder_a_pattern_and_a_file_of_a_remote_file_system(bucket: str) -> None:
    assert list(read_texts([bucket], ReadSettings())) == TEXTS * 2
    assert list(read_texts([f"{bucket}/*.jsonl"], ReadSettings())) == TEXTS
    assert list(read_texts([f"{bucket}/sub/b.jsonl.gz"], ReadSettings())) == TEXTS


def test_parts_of_a_remote_file_know_their_lines(bucket: str) -> None:
    (file,) = list_inputs([f"{bucket}/a.jsonl"], ReadSettings())
    splits = format_of(file, ReadSettings()).splits(file, 50, ReadSettings())
    assert len(splits) > 3
    found = [record for split in splits for record in read_split(split, ReadSettings(), BadRecords())]
    assert [record.fields["text"] for record in found] == TEXTS
    assert [str(record.where).rpartition(":")[2] for record in found] == [str(line) for line in range(1, 21)]


def test_the_key_of_a_remote_file_changes_with_it(bucket: str) -> None:
    before = [content_key(file) for file in list_inputs([bucket], ReadSettings())]
    assert before == [content_key(file) for file in list_inputs([bucket], ReadSettings())]
    fsspec.filesystem("memory").pipe("/bucket/a.jsonl", LINES[:-20].encode())
    after = [content_key(file) for file in list_inputs([bucket], ReadSettings())]
    assert [old == new for old, new in zip(before, after, strict=True)] == [False, True]


def test_what_is_wrong_with_a_remote_input_is_told(bucket: str) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list_inputs([f"{bucket}/nothing"], ReadSettings())
    with pytest.raises(DataError, match=r"files of kind '\.md'"):
        list_inputs([f"{bucket}/notes.md"], ReadSettings())
    with pytest.raises(ConfigError, match="no place to read data from"):
        list_inputs(["pipe:cat /etc/passwd"], ReadSettings())
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/cut.jsonl.gz", gzip.compress(LINES.encode())[:-9])
    with pytest.raises(DataError, match="damaged"):
        list(read_texts([f"{bucket}/cut.jsonl.gz"], ReadSettings()))
    files.pipe("/bucket/bad.jsonl", b'{"text": "x"}\n{\n')
    with pytest.raises(TooManyBad) as error:
        list(read_texts([f"{bucket}/bad.jsonl"], ReadSettings()))
    assert error.value.where == "fsspec+memory://bucket/bad.jsonl:2"
