"""What Ray costs a step: seconds a step on Ray / with the local launcher - 1.

Enters: the test bed of tests/ray/hosts.py.  Leaves: the figure `ray_overhead` of bench/cluster.py, with quartiles.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from bench.cluster_runs import ENDLESS, Run, run_on, start_again
from bench.turns import Turns, send, take_turns, with_descendants
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import REPOSITORY, environment, write_recipe
from tests.ray.hosts import Network

TURNS, TURN_S = 40, 4.0
SETTLES_S = 1.0
"""Of a turn, not counted: all of Ray stood still, and first does what was due meanwhile."""


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
        turns = {name: Turns(partial(with_descendants, run.driver.pid)) for name, run in runs.items()}
        for party in turns.values():
            party.stand_still()
        on_ray = run_on(net, folder / "ray", data, *common, "ray.workers=1", "ray.spare_workers=false")
        runs["ray"] = stack.enter_context(on_ray).has_trained()
        turns["ray"] = Turns(lambda: [pid for host in net.hosts for pid in host.pids()])
        # Before its run is asked to end.
        stack.callback(turns["ray"].go_on)
        turns["ray"].stand_still()
        take_turns(list(turns.values()), TURN_S, until=lambda: len(turns["ray"].stretches) == TURNS)
    start_again(net, *net.hosts[1:-1])
    seconds = {name: step_seconds(run, turns[name]) for name, run in runs.items()}
    of_a_turn = list(zip(seconds["ray"], seconds["local"], seconds["again"], strict=True))
    ratios = [2 * ray / (local + again) for ray, local, again in of_a_turn]
    same = [again / local for _, local, again in of_a_turn]
    lower, middle, upper = quantiles(ratios, n=4)
    return {
        **{f"{name}_step_ms": round(1e3 * median(values), 2) for name, values in seconds.items()},
        "value": round(middle - 1, 4),
        "quartiles": [round(lower - 1, 4), round(upper - 1, 4)],
        "aa": round(median(same), 4),
        "turns": TURNS,
    }


def step_seconds(run: Run, turns: Turns) -> list[float]:
    """Seconds of a step in each turn, once it has settled."""
    ended_at = (record["time"] for record in read_metrics(run.run_dir.metrics, "train"))
    return [(times[-1] - times[0]) / (len(times) - 1) for times in turns.inside(ended_at, settles_s=SETTLES_S)]


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
