"""Tells Ray that the cloud takes this node away: the run saves, and shrinks before the node goes.

    python spot_notice.py aws|gcp|azure --address HEAD:6379

Runs beside Ray on every node; on a node on demand no notice ever comes.  Needs the standard library
and the `ray` command.  Ends with 0 once Ray has accepted the drain, or when another one runs here.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from datetime import UTC, datetime
from pathlib import Path

REQUEST_S = 2.0
SHORT_NOTICE_S = 25
"""What Google and Azure leave of their 30 s when the notice is seen."""


def ask(url: str, *, method: str = "GET", headers: dict[str, str] | None = None) -> str | None:
    """The answer, or None where there is none (yet).  Proxies are for other hosts than this one."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, method=method, headers=headers or {})
    try:
        with opener.open(request, timeout=REQUEST_S) as response:
            answer: str = response.read().decode()
            return answer
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return None
        print(f"{url}: {error}", file=sys.stderr, flush=True)
    except OSError as error:
        print(f"{url}: {error}", file=sys.stderr, flush=True)
    return None


def seconds_until(moment: datetime) -> int:
    return max(1, int((moment - datetime.now(UTC)).total_seconds()))


def aws_notice(metadata: str) -> int | None:
    """Seconds left, or None.  https://docs.aws.amazon.com/AWSEC2/latest/UserGuide/spot-instance-termination-notices.html"""
    token = ask(
        f"{metadata}/latest/api/token",
        method="PUT",
        headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
    )
    if token is None:
        return None
    action = ask(f"{metadata}/latest/meta-data/spot/instance-action", headers={"X-aws-ec2-metadata-token": token})
    if action is None:
        return None
    return seconds_until(datetime.fromisoformat(json.loads(action)["time"]))


def gcp_notice(metadata: str) -> int | None:
    """https://cloud.google.com/compute/docs/instances/create-use-spot#detect-preemption"""
    answer = ask(f"{metadata}/computeMetadata/v1/instance/preempted", headers={"Metadata-Flavor": "Google"})
    return SHORT_NOTICE_S if answer is not None and answer.strip() == "TRUE" else None


def azure_notice(metadata: str) -> int | None:
    """https://learn.microsoft.com/en-us/azure/virtual-machines/linux/scheduled-events"""
    url = f"{metadata}/metadata/scheduledevents?api-version=2020-07-01"
    answer = ask(url, headers={"Metadata": "true"})
    if answer is None:
        return None
    events = json.loads(answer)["Events"]
    return SHORT_NOTICE_S if any(event["EventType"] == "Preempt" for event in events) else None


NOTICES = {"aws": aws_notice, "gcp": gcp_notice, "azure": azure_notice}
METADATA = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}


def own_node(processes: Path) -> str | None:
    """Ray's id of this node, as its raylet was told; None where none runs.

    `ray drain-node` would look for it by joining the cluster; where that finds no Ray, it starts one of its
    own, and drains nothing.
    """
    for words in processes.glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            program, *given = words.read_bytes().decode(errors="replace").split("\0")
            told = dict(word.split("=", 1) for word in given if word.startswith("--node_") and "=" in word)
            if Path(program).name == "raylet" and is_own(told.get("--node_ip_address", "")):
                return told.get("--node_id")
    return None


def is_own(address: str) -> bool:
    """Whether an address is one of this machine: containers may see the processes of other nodes."""
    with contextlib.suppress(OSError), socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.bind((address, 0))
        return bool(address)
    return False


def drain(ray: str, address: str, node: str, seconds: int) -> bool:
    """Ask Ray to drain a node; True when it has accepted."""
    done = subprocess.run(
        [
            *(ray, "drain-node", "--address", address, "--node-id", node),
            *("--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot notice"),
            *("--deadline-remaining-seconds", str(seconds)),
        ],
        check=False,
    )
    return done.returncode == 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cloud", choices=sorted(NOTICES))
    parser.add_argument("--address", required=True, help="HOST:PORT of the head")
    parser.add_argument("--metadata", help="URL of the metadata server, for tests")
    parser.add_argument("--ray", default="ray", help="the `ray` command")
    parser.add_argument("--processes", type=Path, default=Path("/proc"), help="folder of processes, for tests")
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two questions")
    given = parser.parse_args(arguments)
    lock = Path(tempfile.gettempdir()) / f"dist-lm-spot-notice-{os.getuid()}-{given.address.replace(':', '-')}"
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("another one runs on this node", flush=True)
            return 0
        with contextlib.suppress(KeyboardInterrupt):
            return wait_and_drain(given)
    return 130


def wait_and_drain(given: argparse.Namespace) -> int:
    metadata = given.metadata or METADATA[given.cloud]
    while True:
        seconds = NOTICES[given.cloud](metadata)
        if seconds is not None:
            node = own_node(given.processes)
            print(f"this node goes in {seconds} s: {node or 'no Ray runs here'}", flush=True)
            if node and drain(given.ray, given.address, node, seconds):
                return 0
        time.sleep(given.every)


if __name__ == "__main__":
    sys.exit(main())
