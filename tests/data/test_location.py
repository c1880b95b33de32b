"""Locations: what is opened, what is refused, and what of it may be shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.data.location import is_remote, join, local_path, name_of, redact, scheme_of, scrub
from dist_lm.errors import ConfigError

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("location", "scheme"),
    [
        ("data/train", "file"),
        ("/data/train", "file"),
        ("./odd:name", "file"),
        ("C", "file"),
        ("file:///data/train", "file"),
        ("https://host/data", "https"),
        ("http://user:word@host:81/data?x=1", "http"),
        ("s3://bucket/data", "s3"),
        ("S3://bucket", "s3"),
        ("gs://bucket/data", "gs"),
        ("az://container/data", "az"),
        ("abfss://container@account.dfs.core.windows.net/data", "abfss"),
        ("fsspec+sftp://host/data", "sftp"),
    ],
)
def test_paths_and_urls_are_told_apart(location: str, scheme: str) -> None:
    assert scheme_of(location) == scheme
    assert is_remote(location) == (scheme != "file")


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("pipe:cat /etc/passwd", "pipe:"),
        ("pipe://cat", "pipe:"),
        ("PIPE:cat x", "pipe:"),
        ("-", "Standard input"),
        ("", "Standard input"),
        ("| cat x", "commands"),
        ("cat x |", "commands"),
        ("data\ntrain", "control characters"),
        ("data\0train", "control characters"),
        ("simplecache::s3://bucket/data", "Chained"),
        ("s3://bucket/x.zip::zip://y", "Chained"),
        ("zip://x::https://host/y.zip", "Chained"),
        ("sftp://host/data", r"(?s)Known are.*fsspec\+sftp://"),
        ("ssh:host", "local file of this name is ./ssh:host"),
        ("s3:/bucket/data", "two slashes: s3://"),
        ("s3://", "nothing behind"),
        ("fsspec+pipe:cat", "starts no URL"),
    ],
)
def test_what_nobody_should_open_is_refused(location: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        is_remote(location)


def test_a_url_that_was_made_a_path_is_told_to_be_one_no_more() -> None:
    with pytest.raises(ConfigError, match="two slashes"):
        is_remote(Path("s3://bucket/data"))


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("data", "data/m.json"),
        ("file:///a%20b", "/a b/m.json"),
        ("s3://bucket", "s3://bucket/m.json"),
        ("s3://bucket/data/", "s3://bucket/data/m.json"),
        ("https://host/data?sig=a%2Fb", "https://host/data/m.json?sig=a%2Fb"),
        ("fsspec+sftp://host/data", "fsspec+sftp://host/data/m.json"),
    ],
)
def test_names_are_joined_below_the_folder(folder: str, expected: str) -> None:
    assert join(folder, "m.json") == expected
    assert name_of(expected) == "m.json"


def test_a_file_url_is_a_path() -> None:
    assert local_path("file:///data/a%20b") == Path("/data/a b")


def test_secrets_are_in_no_text_that_is_shown() -> None:
    location = "https://anna:pass-word@host:81/data/x.tar?sv=1&X-Amz-Signature=abc%2Fdef"
    assert redact(location) == "https://***@host:81/data/x.tar?***"
    assert redact("s3://bucket/x") == "s3://bucket/x"
    assert redact("/a/b?c") == "/a/b?c"
    assert redact("abfss://box@account/x") == scrub("abfss://box@account/x", "abfss://box@account/x")
    assert redact("abfss://box@account/x") == "abfss://box@account/x"
    assert redact("fsspec+sftp://anna:word@host/x") == "fsspec+sftp://***@host/x"
    for form in (location, "https://host:81/data?X-Amz-Signature=abc/def", "user anna, word pass-word, abc%2Fdef"):
        shown = scrub(f"403 for {form}", location)
        assert "403 for" in shown
        assert not [secret for secret in ("anna", "pass-word", "abc/def", "abc%2Fdef") if secret in shown]


def test_a_refusal_shows_no_secret() -> None:
    with pytest.raises(ConfigError) as caught:
        is_remote("ftp://anna:pass-word@host/x?token=abcdef")
    assert "pass-word" not in str(caught.value)
    assert "abcdef" not in str(caught.value)
