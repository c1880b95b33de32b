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
                         runs that take turns of four seconds, all of Ray standing still in the others'

Phases of a fault: `noticed` Ray's controller decides to start again; `asked` it asks for workers;
`started` they run our code; `joined` imports, data and model are there; `step` the first step since.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.cluster_overhead import ray_overhead
from bench.cluster_runs import ENDLESS, SIGNS, WAIT_S, Run, host_of, prepare_text, run_on, start_again
from bench.recorded import record
from bench.turns import send
from dist_lm.faults import GATE_VARIABLE, VARIABLE
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import write_recipe
from tests.ray.hosts import DASHBOARD_PORT, Host, Network, network

HANGS_AT, STALL_LIMIT_S = 1500, 10
ELASTIC = "ray.workers={min: 1, max: 2}"


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
