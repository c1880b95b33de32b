"""Training on data sets behind a web server and in object storage: the same losses as from this machine."""

from __future__ import annotations

from pathlib import Path

from dist_lm.data.storage import join, write_bytes
from tests.data.http_server import Fault, serving
from tests.data.s3_server import BUCKET, s3_serving
from tests.rank_scenarios import attempt_scenarios, heldout_loss, losses, scenario


def test_where_the_data_lies_changes_nothing_of_a_run(topics_data: Path, tmp_path: Path) -> None:
    pairs = topics_data / "pairs"
    with serving(pairs) as web, s3_serving() as s3:
        for path in pairs.glob("*/*"):
            write_bytes(join(f"s3://{BUCKET}/{path.parent.name}", path.name), path.read_bytes())
        web.faults = [Fault("reset", path=".tar"), Fault("status", path=".tar", status=503), Fault("flip", path=".tar")]
        local = scenario(topics_data, tmp_path / "local")
        cached = scenario(
            topics_data,
            tmp_path / "s3",
            data__train=f"s3://{BUCKET}/train",
            data__heldout=f"s3://{BUCKET}/heldout",
            data__cache={"dir": str(tmp_path / "cache"), "limit_gb": 0.1},
        )
        direct = scenario(
            topics_data, tmp_path / "web", data__train=f"{web.url}/train", data__heldout=f"{web.url}/heldout"
        )
        gone = scenario(topics_data, tmp_path / "gone", data__train=f"{web.url}/nothing")
        outcomes = attempt_scenarios(tmp_path / "ranks", [local, cached, direct, gone], num_ranks=2)
    assert [outcome["exit_code"] for outcome in outcomes] == [0, 0, 0, 3], outcomes
    assert "this is not a data set" in outcomes[-1]["message"]
    assert losses(tmp_path / "s3") == losses(tmp_path / "web") == losses(tmp_path / "local")
    assert heldout_loss(tmp_path / "s3") == heldout_loss(tmp_path / "web") == heldout_loss(tmp_path / "local")
    assert web.fired["reset"] == web.fired["status"] == web.fired["flip"] == 1
    # Both ranks read both shards of the two data sets from one copy each.
    tars = list(pairs.glob("*/*.tar"))
    copies = list((tmp_path / "cache").glob("*/*.tar"))
    assert {copy.name.partition("-")[2] for copy in copies} <= {tar.name for tar in tars}
    assert [s3.gets[name] for name in {tar.name for tar in tars}] == [
        sum(tar.name == name for tar in tars) for name in {tar.name for tar in tars}
    ]
