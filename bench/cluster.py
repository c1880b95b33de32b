"""What a fault costs on a Ray cluster: seconds to the next step, by phase; and what Ray itself costs.

Enters: root on Linux with `ip` (the test bed of tests/ray/hosts.py: a network namespace and a Ray node
for each host, with the health checks of cluster/node_env.sh).  Leaves: a table, and JSON.

    python bench/cluster.py --out bench/results/cluster.md
    python bench/cluster.py --only shrink_s      one figure; repeatable

dead_worker_s            SIGKILL of a worker's process
dead_node_spare_s        power off of a worker's host, workers=2, a third host stands by
shrink_s                 the slower of: power off, link cut; workers={min: 1, max: 2}, no host stands by
frozen_node_s            SIGSTOP of everything on a host, workers={min: 1, max: 2}
hung_thread_s            a worker's training thread waits for ever: seconds beyond run.stall_limit_s (10)
submit_to_first_step_s   `dist-lm submit` to the first step
ray_overhead             seconds a step on Ray / with the local launcher - 1, one worker on a node with a core to spare;
                         runs that take turns of three seconds, all of Ray standing still in the others'

Phases of a fault: `noticed` Ray's controller decides to start again; `asked` it asks for workers;
`started` they run our code; `joined` imports, data and model are there; `step` the first step since.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median, quantiles
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.recorded import record
from bench.turns import send, with_descendants
from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.data.tokenizer import train_tokenizer
from dist_lm.faults import GATE_VARIABLE, VARIABLE
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import REPOSITORY, environment, write_recipe
from tests.ray.hosts import DASHBOARD_PORT, Host, Network, network
from tests.ray.watched import IDLE

WAIT_S = 150.0
TRAINED_S, RESTS_S = 10.0, 3.0
"""How long a run has trained at least when the fault comes, and for how long its spare workers have then rested: they
have imported everything."""
ENDLESS = 1_000_000
OVERHEAD_TURNS, TURN_S = 40, 3.0
HANGS_AT, STALL_LIMIT_S = 1500, 10
ELASTIC = "ray.workers={min: 1, max: 2}"
SIGNS = {
    "noticed": "[FailurePolicy] RETRY",
    "asked": "Attempting to start training worker group",
    "started": "Started training worker group",
}
"""What Ray's controller prints at the end of a phase."""


def prepare_text(folder: Path) -> Path:
    """The language reference of Python as training data."""
    texts = [topics[name] for name in sorted(topics)]
    source = folder / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, vocab_size=1000, out=folder / "tokenizer")
    common: dict[str, Any] = {"tokenizer": folder / "tokenizer", "seq_len": 64, "workers": 1, "heldout_fraction": 0.05}
    prepare(PrepareOptions([str(source)], folder / "pairs", **common))
    return folder


@dataclass
class Run:
    """A run on the test bed, until it is ended."""

    run_dir: RunDir
    driver: subprocess.Popen[bytes]
    log: Path

    def attempts(self) -> int:
        return len(list(self.run_dir.attempts.glob("*.json")))

    def last_step_at(self) -> float:
        times = [record["time"] for record in read_metrics(self.run_dir.metrics, "train")]
        return max(times, default=0.0)

    def until(self, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not ready():
            if self.driver.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run does not get there\n{self.log.read_text()[-4000:]}")
            time.sleep(0.05)

    def until_it_trains(self) -> None:
        began = time.time()
        self.until(lambda: self.last_step_at() > began)

    def has_trained(self, net: Network | None = None) -> Run:
        """Wait until it has trained for TRAINED_S, and the spare workers of `net` are ready."""
        began = time.monotonic()
        self.until(lambda: time.monotonic() - began > TRAINED_S)
        if net is not None:
            spares = Spares(net)
            self.until(spares.are_ready)
        return self

    def measure(self, fault: Callable[[], None]) -> dict[str, float]:
        """Seconds from the fault to the end of each phase, the last of them the next step."""
        attempts, shown = self.attempts(), self.log.stat().st_size
        began = time.time()
        fault()
        seen: dict[str, float] = {}

        def trains_again() -> bool:
            said = self.log.read_bytes()[shown:].decode(errors="replace")
            for phase, sign in SIGNS.items():
                # A group that could not be had is asked for once more: the last one counts.
                if (said.count(sign), phase) not in counted and sign in said:
                    counted.add((said.count(sign), phase))
                    seen[phase] = time.time() - began
            return self.attempts() > attempts and self.last_step_at() > self._joined_at()

        counted: set[tuple[int, str]] = set()
        self.until(trains_again)
        seen["joined"] = self._joined_at() - began
        first = [r["time"] for r in read_metrics(self.run_dir.metrics, "train") if r["time"] > self._joined_at()]
        seen["step"] = min(first) - began
        return {phase: round(value, 1) for phase, value in seen.items()}

    def _joined_at(self) -> float:
        at: float = self.run_dir.attempt_facts(self.attempts())["began_at"]
        return at

    def worker_pids(self) -> list[int]:
        pids: list[int] = self.run_dir.attempt_facts(self.attempts())["pids"]
        return pids


@contextmanager
def run_on(net: Network, folder: Path, data: Path, *overrides: str) -> Iterator[Run]:
    """A run that trains; stopped when the block ends."""
    folder.mkdir()
    recipe = write_recipe(folder / "recipe.yaml", data, run__steps=ENDLESS, run__save_every=20, run__keep=2)
    log = folder / "driver.log"
    net.head.popen([sys.executable, REPOSITORY / "launch" / "on_ray.py", "-c", recipe, *overrides], log)
    driver = net.head.processes[-1]
    run = Run(RunDir(folder / "run"), driver, log)
    try:
        run.until_it_trains()
        yield run
    finally:
        driver.terminate()
        driver.wait()


class Spares:
    """Workers of Ray that wait for a group of ranks, or import what those need."""

    def __init__(self, net: Network) -> None:
        self._net = net
        self._used: dict[int, float] = {}
        self._at = time.monotonic()

    def are_ready(self) -> bool:
        """Call it again and again: it compares."""
        if time.monotonic() - self._at < RESTS_S:
            return False
        before, self._used, self._at = self._used, self._processor_seconds(), time.monotonic()
        if not before or before.keys() != self._used.keys():
            return False
        return all(self._used[pid] - used < RESTS_S / 20 for pid, used in before.items())

    def _processor_seconds(self) -> dict[int, float]:
        """By process."""
        found = {}
        for pid in (pid for host in self._net.hosts[1:] for pid in host.pids()):
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(pid)
                if process.name() == IDLE:
                    times = process.cpu_times()
                    found[pid] = times.user + times.system
        return found


def host_of(net: Network, pid: int) -> Host:
    return next(host for host in net.hosts if pid in host.pids())


def start_again(net: Network, *hosts: Host, **options: Any) -> None:
    """New nodes on these hosts, with options of `Network.start_node`; every other host has one."""
    for host in hosts:
        host.kill()
        host.join_again()
    # Until the old ones are known to be dead they would be counted for the new ones.
    net.wait_for_nodes(len(net.hosts) - len(hosts))
    for host in hosts:
        net.start_node(host, **options)
    net.wait_for_nodes(len(net.hosts))


def freeze(host: Host) -> None:
    send(host.pids(), signal.SIGSTOP)


def dead_worker(net: Network, folder: Path, data: Path) -> dict[str, Any]:
    with run_on(net, folder / "worker", data, "ray.workers=2") as run:
        return run.has_trained(net).measure(lambda: os.kill(run.worker_pids()[1], signal.SIGKILL))


def dead_node_spare(net: Network, folder: Path, data: Path) -> dict[str, Any]:
    with run_on(net, folder / "spare", data, "ray.workers=2") as run:
        host = host_of(net, run.worker_pids()[1])
        phases = run.has_trained(net).measure(host.kill)
    start_again(net, host)
    return phases


def hung_thread(net: Network, folder: Path, data: Path) -> dict[str, Any]:
    """Ray sees a worker that lives: the ranks must tell."""
    gate = folder / "gate" / "never"
    gate.parent.mkdir()
    hangs = {VARIABLE: f"hold@rank1:step{HANGS_AT}:before_forward", GATE_VARIABLE: str(gate)}
    start_again(net, *net.hosts[1:], env=hangs)
    with run_on(net, folder / "hung", data, "ray.workers=2", f"run.stall_limit_s={STALL_LIMIT_S}") as run:
        run.until(lambda: any(gate.parent.iterdir()))
        phases = run.measure(lambda: None)
    start_again(net, *net.hosts[1:])
    return {phase: round(seconds - STALL_LIMIT_S, 1) for phase, seconds in phases.items()}


def shrink(net: Network, folder: Path, data: Path) -> dict[str, Any]:
    return {
        "power_off": _elastic(net, folder / "off", data, Host.kill),
        "link_cut": _elastic(net, folder / "cut", data, Host.cut),
    }


def frozen_node(net: Network, folder: Path, data: Path) -> dict[str, Any]:
    return _elastic(net, folder / "frozen", data, freeze)


def _elastic(net: Network, folder: Path, data: Path, fault: Callable[[Host], None]) -> dict[str, Any]:
    """Without the host that stands by, so that the group must shrink."""
    spare = net.hosts[-1]
    spare.kill()
    net.wait_for_nodes(len(net.hosts) - 1)
    with run_on(net, folder, data, ELASTIC) as run:
        host = host_of(net, run.worker_pids()[1])
        phases = run.has_trained(net).measure(lambda: fault(host))
        print(f"{fault.__name__} {phases}", file=sys.stderr, flush=True)
    start_again(net, host, spare)
    return phases


def submit_to_first_step(net: Network, folder: Path, data: Path) -> dict[str, Any]:
    folder = folder / "submitted"
    folder.mkdir()
    recipe = write_recipe(folder / "recipe.yaml", data, run__steps=ENDLESS)
    address = ("--address", f"http://{net.head.address}:{DASHBOARD_PORT}")
    words = [sys.executable, "-m", "dist_lm", "submit", "-c", recipe, "--working-dir", folder, "ray.workers=2"]
    began = time.time()
    net.head.popen([*words, *address], folder / "submit.log")
    submit = net.head.processes[-1]
    run = Run(RunDir(folder / "run"), submit, folder / "submit.log")
    if submit.wait() != 0:
        raise RuntimeError(run.log.read_text())
    sent = time.time() - began
    while not run.last_step_at():
        if time.time() - began > WAIT_S:
            raise RuntimeError("the job does not train")
        time.sleep(0.05)
    step = min(record["time"] for record in read_metrics(run.run_dir.metrics, "train")) - began
    net.head.run([sys.executable, "-m", "dist_lm", "job", "stop", "run", *address])
    return {"sent": round(sent, 1), "step": round(step, 1)}


@contextmanager
def run_beside(folder: Path, recipe_data: Path, *overrides: str) -> Iterator[Run]:
    """A run of the local launcher that trains; ended when the block ends."""
    folder.mkdir()
    recipe = write_recipe(folder / "recipe.yaml", recipe_data, run__steps=ENDLESS)
    words = [sys.executable, "-m", "dist_lm", "train", "-c", recipe, *overrides, "--cpu", "1"]
    with (folder / "log").open("wb") as log:
        launcher = subprocess.Popen(
            words, env=environment(), cwd=REPOSITORY, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
    run = Run(RunDir(folder / "run"), launcher, folder / "log")
    try:
        run.until_it_trains()
        yield run
    finally:
        for number in (signal.SIGTERM, signal.SIGCONT):
            send(with_descendants(launcher.pid), number)
        launcher.wait()


def ray_overhead(net: Network, folder: Path, data: Path) -> dict[str, Any]:
    """Three runs of one worker take turns: on Ray, and two of the local launcher, which must be alike.

    All of Ray stands still in the others' turns.  In its own it has the core that the worker leaves, as on a machine
    with GPUs; two workers here would measure how three parties share two cores.
    """
    for host in net.hosts[1:-1]:
        host.kill()
    net.wait_for_nodes(2)
    size = ("model.overrides.hidden_size=128", "model.overrides.intermediate_size=512")
    common = (*size, f"run.save_every={ENDLESS}")
    with ExitStack() as stack:
        runs = {name: stack.enter_context(run_beside(folder / name, data, *common)) for name in ("local", "again")}
        processes: dict[str, Callable[[], list[int]]] = {
            name: partial(with_descendants, run.driver.pid) for name, run in runs.items()
        }
        for pids in processes.values():
            send(pids(), signal.SIGSTOP)
        on_ray = run_on(net, folder / "ray", data, *common, "ray.workers=1", "ray.spare_workers=false")
        runs["ray"] = stack.enter_context(on_ray).has_trained()
        processes["ray"] = lambda: [pid for host in net.hosts for pid in host.pids()]
        # Before its run is asked to end.
        stack.callback(lambda: send(processes["ray"](), signal.SIGCONT))
        send(processes["ray"](), signal.SIGSTOP)
        stretches = take_turns(processes, turns=OVERHEAD_TURNS, seconds=TURN_S)
    start_again(net, *net.hosts[1:-1])
    seconds = {name: step_seconds(run, stretches[name]) for name, run in runs.items()}
    of_a_turn = list(zip(seconds["ray"], seconds["local"], seconds["again"], strict=True))
    ratios = [2 * ray / (local + again) for ray, local, again in of_a_turn]
    same = [again / local for _, local, again in of_a_turn]
    lower, middle, upper = quantiles(ratios, n=4)
    return {
        **{f"{name}_step_ms": round(1e3 * median(values), 2) for name, values in seconds.items()},
        "value": round(middle - 1, 4),
        "quartiles": [round(lower - 1, 4), round(upper - 1, 4)],
        "aa": round(median(same), 4),
        "turns": OVERHEAD_TURNS,
    }


def take_turns(
    processes: dict[str, Callable[[], list[int]]], *, turns: int, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """(began, ended) of each turn of each party, all of whose processes stand still before and after.

    The order rotates.
    """
    stretches: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
    order = list(processes)
    for number in range(turns):
        for index in range(len(order)):
            name = order[(index + number) % len(order)]
            send(processes[name](), signal.SIGCONT)
            began = time.time()
            time.sleep(seconds)
            stretches[name].append((began, time.time()))
            send(processes[name](), signal.SIGSTOP)
    return stretches


def step_seconds(run: Run, stretches: list[tuple[float, float]]) -> list[float]:
    """Seconds of a step in each stretch, of the steps that lie within it but the first."""
    ended_at = [record["time"] for record in read_metrics(run.run_dir.metrics, "train")]
    inside = [[moment for moment in ended_at if began <= moment <= ended][1:] for began, ended in stretches]
    return [(times[-1] - times[0]) / (len(times) - 1) for times in inside]


FIGURES: dict[str, Callable[[Network, Path, Path], dict[str, Any]]] = {
    "submit_to_first_step_s": submit_to_first_step,
    "dead_worker_s": dead_worker,
    "dead_node_spare_s": dead_node_spare,
    "shrink_s": shrink,
    "frozen_node_s": frozen_node,
    "hung_thread_s": hung_thread,
    "ray_overhead": ray_overhead,
}


def value_of(phases: dict[str, Any]) -> float:
    """The figure itself: seconds to the step, of the slowest variant."""
    if "value" in phases:
        return float(phases["value"])
    if "step" in phases:
        return float(phases["step"])
    return max(value_of(variant) for variant in phases.values())


PHASES = (*SIGNS, "sent", "joined", "step")


def rows(key: str, phases: dict[str, Any]) -> Iterator[str]:
    """Rows of the table of one figure."""
    if "step" in phases:
        yield f"| {key} | " + " | ".join(str(phases.get(phase, "")) for phase in PHASES) + " |"
    elif "value" not in phases:
        for variant, inner in phases.items():
            yield from rows(f"{key} {variant}", inner)


def table(found: dict[str, dict[str, Any]]) -> str:
    """Seconds from a fault, or from the submission, to the end of each phase."""
    head = [f"| s | {' | '.join(PHASES)} |", "|---" * (1 + len(PHASES)) + "|"]
    lines = [*head, *(row for key, phases in found.items() for row in rows(key, phases))]
    if "ray_overhead" in found:
        steps = found["ray_overhead"]
        lower, upper = steps["quartiles"]
        lines += [
            "",
            f"ray_overhead {steps['value']:+.2%}, quartiles of {steps['turns']} turns {lower:+.2%} and {upper:+.2%}.",
            "",
            f"A step takes {steps['ray_step_ms']} ms on Ray, {steps['local_step_ms']} and {steps['again_step_ms']} ms",
            f"in two runs of the local launcher (aa {steps['aa']}).",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the table; the figures go to the .json beside it")
    parser.add_argument("--only", action="append", choices=sorted(FIGURES), help="measure this one; repeatable")
    given = parser.parse_args()
    # Where time runs out, no host is left, and what was measured is told.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    found: dict[str, dict[str, Any]] = {}
    try:
        measure_all(given.only or list(FIGURES), found)
    finally:
        figures = {key: value_of(phases) for key, phases in found.items()}
        by_phase = {f"{key}_by_phase": phases for key, phases in found.items()}
        record("What a fault costs on a Ray cluster", table(found), {**figures, **by_phase}, given.out)


def measure_all(wanted: list[str], found: dict[str, dict[str, Any]]) -> None:
    """Measure on one test bed of a head and three hosts; `found` gets each figure's phases when it is there."""
    with tempfile.TemporaryDirectory(prefix="dlb-") as name:
        data = prepare_text(Path(name))
        with network(4) as net:
            net.start_head(num_cpus=0)
            for host in net.hosts[1:]:
                net.start_node(host)
            net.wait_for_nodes(4)
            for key in wanted:
                found[key] = FIGURES[key](net, Path(name), data)
                print(f"{key} {value_of(found[key])}  {found[key]}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
