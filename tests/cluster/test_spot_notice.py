"""The sidecar against a metadata server of this machine: it asks as each cloud wants, drains once, ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SIDECAR = REPOSITORY / "cluster" / "spot_notice.py"
NODE = "16702c89"
QUIET = 2
"""Questions that are answered with no notice before it comes."""


class Metadata(BaseHTTPRequestHandler):
    """What the three clouds answer; the notice comes after some questions."""

    asked: ClassVar[list[str]] = []

    def do_PUT(self) -> None:
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self._answer("secret" if self.path == "/latest/api/token" else None)

    def do_GET(self) -> None:
        self.asked.append(self.path)
        here = len(self.asked) > QUIET
        if self.path == "/latest/meta-data/spot/instance-action":
            assert self.headers["X-aws-ec2-metadata-token"] == "secret"
            moment = (datetime.now(UTC) + timedelta(seconds=120)).strftime("%Y-%m-%dT%H:%M:%SZ")
            self._answer(json.dumps({"action": "terminate", "time": moment}) if here else None)
        elif self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer("TRUE" if here else "FALSE")
        elif self.path.startswith("/metadata/scheduledevents?"):
            assert self.headers["Metadata"] == "true"
            kind = "Preempt" if here else "Reboot"
            self._answer(json.dumps({"DocumentIncarnation": 1, "Events": [{"EventType": kind}]}))
        else:
            self._answer(None)

    def _answer(self, text: str | None) -> None:
        self.send_response(404 if text is None else 200)
        self.end_headers()
        self.wfile.write((text or "").encode())

    def log_message(self, format: str, *arguments: object) -> None:
        """Keep the test's output quiet."""


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.asked.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """A `ray` that writes down how it was called, and refuses the first time."""
    command = tmp_path / "ray"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$(wc -l < {tmp_path}/calls)" -gt 1 ]\n')
    command.chmod(0o755)
    return command


def processes(folder: Path) -> Path:
    """A raylet of another host, which a container may see, then this host's, which knows its id."""
    for number, (address, node) in enumerate([("203.0.113.1", "other"), ("127.0.0.1", NODE)]):
        words = ["/somewhere/raylet", "--node_manager_port=0", f"--node_id={node}", f"--node_ip_address={address}"]
        (folder / str(number)).mkdir(parents=True)
        (folder / str(number) / "cmdline").write_text("\0".join(words) + "\0")
    return folder


def start(cloud: str, metadata: str, ray: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            *(sys.executable, str(SIDECAR), cloud, "--address", f"10.0.0.1:{os.getpid()}"),
            *("--metadata", metadata, "--ray", str(ray), "--every", "0.01"),
            *("--processes", str(ray.parent / "processes")),
        ],
        # Its lock lies where temporary files do.
        env={**os.environ, "TMPDIR": str(ray.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", range(100, 121)), ("gcp", [25]), ("azure", [25])])
def test_a_notice_drains_the_node_and_a_refused_drain_is_tried_again(
    cloud: str, seconds: range | list[int], metadata: str, ray: Path
) -> None:
    processes(ray.parent / "processes")
    sidecar = start(cloud, metadata, ray)
    output, _ = sidecar.communicate(timeout=60)
    assert sidecar.returncode == 0, output
    calls = (ray.parent / "calls").read_text().splitlines()
    assert len(calls) == 2
    for call in calls:
        words = call.split()
        assert words[:5] == ["drain-node", "--address", f"10.0.0.1:{os.getpid()}", "--node-id", NODE]
        assert words[words.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
        assert int(words[-1]) in seconds
    # It did wait for the notice.
    assert len(Metadata.asked) == QUIET + 2


def test_a_metadata_server_that_is_away_is_asked_again_and_one_sidecar_runs_on_a_node(
    tmp_path: Path, ray: Path
) -> None:
    nobody = "http://127.0.0.1:1"
    first = start("gcp", nobody, ray)
    assert first.stdout is not None
    # Both lines stand for a question that failed: it goes on asking.
    assert "refused" in first.stdout.readline()
    assert "refused" in first.stdout.readline()
    second = start("gcp", nobody, ray)
    output, _ = second.communicate(timeout=60)
    assert second.returncode == 0
    assert output == "another one runs on this node\n"
    first.kill()
    first.communicate()
    assert not (tmp_path / "calls").exists()


@pytest.mark.parametrize("script", ["node_setup.sh", "node_env.sh", "slurm.sbatch"])
def test_the_shell_reads_the_scripts(script: str) -> None:
    done = subprocess.run(["bash", "-n", REPOSITORY / "cluster" / script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
