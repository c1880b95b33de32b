"""Three hosts train; hosts are taken away and come back, and nothing of the run is lost or doubled."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ray.hosts import GCS_PORT, RAY, network
from tests.ray.watched import WatchedRun, samples_in

pytestmark = pytest.mark.ray
SLOW = "4mbit"
"""What a host sends: half a second a step, so that the run is not far ahead of the test."""
NOTICE_S = 60
# The one restart is for the host that is cut off.
ELASTIC = ("ray.workers={min: 1, max: 3}", "ray.resize_s=2", "--max-restarts", "1")
LINES_A_GROUP = 200
"""A traceback of each rank, and what Ray and DeepSpeed say."""


def test_a_run_goes_on_when_a_host_is_taken_away_comes_back_and_another_is_cut_off(
    topics_data: Path, tmp_path: Path
) -> None:
    with network(4, samples_in(tmp_path)) as net:
        net.start_head(num_cpus=0)
        workers = net.hosts[1:]
        for host in workers:
            net.start_node(host)
        net.wait_for_nodes(4)
        for host in workers:
            host.slow_down(SLOW)
        run = WatchedRun(net, net.head, tmp_path / "run", topics_data, *ELASTIC)
        run.until_it_trains_with(3)
        # A process for each worker waits for the next group.
        run.until(lambda: len(run.spares()) == 3)
        spares = {process.pid for process in run.spares()}

        # What cluster/spot_notice.py runs on a node that the cloud takes away.
        leaving = run.host_of(rank=2)
        first = run.pids()
        node = ("--address", f"{net.head.address}:{GCS_PORT}", "--node-id", net.node_id(leaving))
        reason = ("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice")
        done = leaving.run([RAY, "drain-node", *node, *reason, "--deadline-remaining-seconds", NOTICE_S])
        assert done.returncode == 0, done.stderr
        run.until_it_trains_with(3, 2)
        before, after = run.attempts()
        # No step was lost, it was not the periodic save only, and nobody was left on the node.
        assert after["from_step"] == before["step"]
        assert "a node is taken away" in run.told()
        assert first[2] not in leaving.pids()
        assert set(run.pids()) < spares

        leaving.kill()
        net.start_node(leaving)
        run.until_it_trains_with(3, 2, 3)
        before, after = run.attempts()[1:]
        assert after["from_step"] == before["step"]
        assert "there are more nodes" in run.told()

        # All hosts share this machine's disk, which no cut takes away: a first rank that goes on to
        # write there would rightly keep the run's lease.
        lost = run.host_of(rank=1)
        lost.cut()
        run.until_it_trains_with(3, 2, 3, 2)
        # What waits there cannot hear that the job ends.
        lost.kill()

        run.stop()
    assert run.sizes() == [3, 2, 3, 2]
    # Every rank's log stays with the run, and the faults fill no log.
    logs = {path.name: path.read_text() for path in run.run_dir.logs.glob("rank-*.log")}
    assert sorted(logs) == [f"rank-{rank:05d}.log" for rank in range(3)]
    assert f"saved step-{run.last_step():08d}" in logs["rank-00000.log"]
    steps = sum("tok/s" in line for line in run.told().splitlines())
    assert len(run.told().splitlines()) - steps < LINES_A_GROUP * len(run.sizes())
    run.assert_as_undisturbed(tmp_path / "calm")
