"""The doctor on a Ray cluster of one node: what its nodes answer, and a clock that is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.cluster import ray_cluster
from dist_lm.doctor.ray_side import check_cluster

pytestmark = pytest.mark.ray


def test_nodes_that_reach_the_run_folder_are_told_and_a_clock_that_is_wrong(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (finding,) = check_cluster(None)
    assert finding.what == "1 nodes live"
    run_dir = tmp_path / "run"
    (finding,) = check_cluster(run_dir)
    assert (finding.level, finding.what) == ("ok", f"1 nodes with the same versions reach {run_dir}")
    assert not run_dir.exists(), "what a check writes it removes again"
    answer = ray_cluster.answer_from_node

    def an_hour_late(meeting: str, nonce: str, node_id: str) -> dict[str, object]:
        return {**answer(meeting, nonce, node_id), "skew_s": -3600.0}

    monkeypatch.setattr(ray_cluster, "answer_from_node", an_hour_late)
    _, clock = check_cluster(run_dir)
    assert clock.level == "warn"
    assert "-3600.0 s away" in clock.what
    assert "NTP" in clock.do
