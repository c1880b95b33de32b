"""Preparation of files behind a real web server and in a real S3 server, both with faults."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.sources.format import ReadSettings
from dist_lm.data.sources.inputs import read_texts
from dist_lm.data.storage import write_bytes
from dist_lm.data.tokenizer import Tokenizer
from tests.data.http_server import Fault, serving
from tests.data.preparation.preparing import SMALL, TEXTS, files_of
from tests.data.s3_server import BUCKET, S3Fault, s3_serving


def shards_of(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in files_of(out).items() if not name.endswith("manifest.json")}


def test_a_bucket_gives_the_shards_of_a_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    pq.write_table(pa.table({"text": TEXTS[:200]}), folder / "a.parquet", row_group_size=50)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[200:])
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    settings = {**SMALL, "tokenizer": tokenizer.path, "kind": "tokens"}
    prepare(PrepareOptions(inputs=[str(folder)], out=tmp_path / "local", **settings))
    with s3_serving() as server:
        for path in folder.iterdir():
            write_bytes(f"s3://{BUCKET}/dump/{path.name}", path.read_bytes())
        server.faults = [S3Fault("cut", "a.parquet"), S3Fault("slow_down", "b.jsonl.gz")]
        from_bucket = PrepareOptions(inputs=[f"s3://{BUCKET}/dump/*"], out=tmp_path / "remote", **settings)
        prepare(from_bucket)
        assert server.fired == {"cut": 1, "slow_down": 1}
        assert prepare(from_bucket).up_to_date
    assert shards_of(tmp_path / "remote") == shards_of(tmp_path / "local")


def test_a_broken_connection_loses_no_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    with serving(tmp_path) as server:
        server.faults = [Fault("reset", "a.jsonl", min_bytes=100)]
        assert list(read_texts([f"{server.url}/a.jsonl"], ReadSettings())) == TEXTS
        assert server.fired["reset"] == 1
