"""Hosts of their own on one machine: network namespaces on a bridge, a real Ray node in each.

Enters: root on Linux with `ip` (iproute2).  Leaves: hosts with addresses, which can be killed, cut off,
slowed and given back.
Promises: whatever happens, no process, namespace or link is left; where it cannot run it says why.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.gloo_ranks import REPOSITORY, environment

RAY = Path(sys.executable).with_name("ray")
START_S = 90.0
END_S = 30.0
GCS_PORT, DASHBOARD_PORT = 6379, 8265
TAKES_JOBS = f"""
import os, sys, time, urllib.request
from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD
from ray._raylet import GcsClient
from ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX as AGENT
address = sys.argv[1]
headers = {{"Authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}}
request = urllib.request.Request(f"http://{{address}}:{DASHBOARD_PORT}/api/jobs/", headers=headers)
opener = urllib.request.build_opener(urllib.request.ProxyHandler({{}}))
gcs = GcsClient(address=f"{{address}}:{GCS_PORT}")
deadline = time.monotonic() + {START_S}
while True:
    try:
        opener.open(request, timeout=5)
        if gcs.internal_kv_keys(AGENT.encode(), KV_NAMESPACE_DASHBOARD):
            break
    except OSError:
        if time.monotonic() > deadline:
            raise
    time.sleep(0.1)
    assert time.monotonic() < deadline, "no agent of the dashboard"
"""
"""Ends once the head's dashboard answers, and the agent that starts jobs is there."""


def _run(*words: str | Path) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, words))}: {done.stderr.strip()} (the test bed needs root and ip)"
    return done.stdout


@dataclass
class Host:
    """A network namespace with one address and a name of its own."""

    name: str
    address: str
    link: str
    """The bridge's end of the cable."""
    folder: Path
    variables: dict[str, str]
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def popen(
        self, words: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Start a program on this host, as the leader of a process group."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*self._here(), *(str(word) for word in words)],
                env=environment({**self.variables, **(env or {})}),
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def run(
        self, words: Sequence[str | Path | int], *, env: Mapping[str, str] | None = None, timeout_s: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run a program on this host to its end."""
        return subprocess.run(
            [*self._here(), *(str(word) for word in words)],
            env=environment({**self.variables, **(env or {})}),
            cwd=REPOSITORY,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def _here(self) -> list[str]:
        """The words of a program that runs the words after it on this host, in the same process."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', self.name]
        return ["ip", "netns", "exec", self.name, *named]

    def pids(self) -> list[int]:
        return [int(word) for word in _run("ip", "netns", "pids", self.name).split()]

    def kill(self) -> None:
        """Power off: every process on the host ends at once."""
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for process in self.processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=1)
        self.processes.clear()

    def cut(self) -> None:
        """Pull the cable: nothing arrives, nothing is refused."""
        _run("ip", "link", "set", self.link, "down")

    def join_again(self) -> None:
        _run("ip", "link", "set", self.link, "up")

    def slow_down(self, rate: str) -> None:
        """Limit what the host sends, such as `20mbit`."""
        limit = ("tbf", "rate", rate, "burst", "64kb", "latency", "400ms")
        _run("tc", "-n", self.name, "qdisc", "replace", "dev", "eth0", "root", *limit)

    def give_back_speed(self) -> None:
        _run("tc", "-n", self.name, "qdisc", "del", "dev", "eth0", "root")


class Network:
    """A bridge and its hosts; the first host is the head of the Ray cluster."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.tag = secrets.token_hex(3)
        self.subnet = f"10.213.{secrets.randbelow(254) + 1}"
        self.bridge = f"dl{self.tag}"
        # Ray's sockets lie in this folder, and their names have a limit of 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="dlh-"))
        self.hosts: list[Host] = []
        self._dashboard_awaited = False
        self.variables = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "3",
            "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
            # Eight idle workers a node are a lot for two cores.
            "RAY_prestart_worker_first_driver": "0",
            # The hosts share this machine's memory with everything else that runs here.
            "RAY_memory_monitor_refresh_ms": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
            "RAY_ADDRESS": f"{self.subnet}.1:{GCS_PORT}",
            "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(REPOSITORY)])),
            **variables,
        }

    @property
    def head(self) -> Host:
        return self.hosts[0]

    def add_host(self) -> Host:
        number = len(self.hosts) + 1
        name, link = f"{self.bridge}-{number}", f"{self.bridge}v{number}"
        host = Host(name, f"{self.subnet}.{number}", link, self.folder / str(number), dict(self.variables))
        host.folder.mkdir()
        if not self.hosts:
            _run("ip", "link", "add", self.bridge, "type", "bridge")
            _run("ip", "link", "set", self.bridge, "up")
        _run("ip", "netns", "add", name)
        self.hosts.append(host)
        _run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
        _run("ip", "link", "set", link, "master", self.bridge, "up")
        for words in (("addr", "add", f"{host.address}/24", "dev", "eth0"), ("link", "set", "eth0", "up")):
            _run("ip", "-n", name, *words)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        return host

    def start_head(self, *words: str, num_cpus: int, env: Mapping[str, str] | None = None) -> None:
        """`words`: further ones of `ray start`."""
        head = ["--head", "--port", str(GCS_PORT), "--dashboard-host", self.head.address]
        self._dashboard_awaited = True
        self._start_node(self.head, [*head, *words], num_cpus, env or {})

    def start_node(
        self, host: Host, *, num_cpus: int = 1, env: Mapping[str, str] | None = None, inside: Sequence[str] = ()
    ) -> None:
        """`inside`: the words of a program that runs the words after it."""
        self._start_node(host, ["--address", f"{self.head.address}:{GCS_PORT}"], num_cpus, env or {}, inside)

    def _start_node(
        self, host: Host, words: Sequence[str], num_cpus: int, env: Mapping[str, str], inside: Sequence[str] = ()
    ) -> None:
        # A node that comes back is a new one: its old session is gone.
        session = host.folder / f"s{len(list(host.folder.iterdir()))}"
        session.mkdir()
        common = ["--block", "--disable-usage-stats", "--num-cpus", str(num_cpus), "--node-ip-address", host.address]
        memory = ["--object-store-memory", "80000000", "--temp-dir", str(session)]
        host.popen([*inside, RAY, "start", *words, *common, *memory], host.folder / "node.log", env)

    def _ask_gcs(self, script: str) -> subprocess.CompletedProcess[str]:
        """Run a script with `nodes`, what the head's GCS says of each node: quicker than joining the cluster."""
        client = f"GcsClient(address='{self.head.address}:{GCS_PORT}')"
        nodes = f"from ray._raylet import GcsClient; nodes = {client}.get_all_node_info(timeout=5).values()"
        return self.head.run([sys.executable, "-c", f"{nodes}; alive = [n for n in nodes if n.state == 0]; {script}"])

    def wait_for_nodes(self, number: int) -> None:
        """Until so many nodes are alive, and the head takes jobs."""
        deadline = time.monotonic() + START_S
        while True:
            done = self._ask_gcs(f"raise SystemExit(0 if len(alive) == {number} else 9)")
            if done.returncode == 0:
                break
            logs = "\n".join(path.read_text() for path in self.folder.glob("*/node.log"))
            assert time.monotonic() < deadline, f"{done.stdout}{done.stderr}\n{logs}"

        if self._dashboard_awaited:
            done = self.head.run([sys.executable, "-c", TAKES_JOBS, self.head.address])
            assert done.returncode == 0, done.stderr
            self._dashboard_awaited = False

    def node_ids(self) -> set[str]:
        """Ray's ids of all nodes that live."""
        done = self._ask_gcs("print(*[n.node_id.hex() for n in alive])")
        assert done.returncode == 0, done.stderr
        return set(done.stdout.splitlines()[-1].split())

    def node_id(self, host: Host) -> str:
        """Ray's id of the node that lives on a host."""
        wanted = f"[n.node_id.hex() for n in alive if n.node_manager_address == '{host.address}']"
        done = self._ask_gcs(f"(found,) = {wanted}; print(found)")
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def end(self) -> None:
        for host in self.hosts:
            host.kill()
        for host in self.hosts:
            subprocess.run(["ip", "link", "del", host.link], capture_output=True, check=False)
            subprocess.run(["ip", "netns", "del", host.name], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True, check=False)
        shutil.rmtree(self.folder, ignore_errors=True)
        assert self.tag not in _run("ip", "link") + _run("ip", "netns", "list")


@contextlib.contextmanager
def network(num_hosts: int, variables: Mapping[str, str] | None = None) -> Iterator[Network]:
    """So many hosts that reach each other; nothing of them is left at the end."""
    net = Network(variables or {})
    try:
        for _ in range(num_hosts):
            net.add_host()
        yield net
    finally:
        net.end()
