"""A Ray cluster before a run starts on it: does it answer, are its nodes alike, do all reach the run folder.

Enters: a run folder.  Leaves: what each node said; or an error.
Promises: what would make a run wait or fail later is told within seconds and names the node; nothing
of the run has started by then.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dist_lm.disk import disk_errors
from dist_lm.errors import EnvironmentFault
from dist_lm.ray_connection import join

NODE_ANSWER_S = 60.0
"""How long a node may take to start a process that imports nothing heavy."""
_ALIKE = ("dist-lm", "torch", "deepspeed", "transformers", "numpy")
"""Packages in which two nodes of a run must not differ; Ray checks itself and Python."""


def connect() -> None:
    """Join the cluster; its head must have a dashboard."""
    if not join():
        import ray

        address = ray.get_runtime_context().gcs_address
        ray.shutdown()
        raise EnvironmentFault(
            "the head of the Ray cluster runs without its dashboard",
            where=address,
            why="Ray Train asks it which runs are alive, and without it fills the log with failed questions.",
            do="Install ray[default] on the head and start it without --include-dashboard=false.",
        )


def living_nodes() -> list[dict[str, Any]]:
    """Ray's facts about each node that it believes to live, and that is not being drained: nothing is put
    on such a node any more."""
    import ray
    from ray._private.state import state

    going = state.get_draining_nodes()
    return [node for node in ray.nodes() if node["Alive"] and node["NodeID"] not in going]


def check_nodes(run_dir: Path, nodes: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Every node reads what this process wrote into the run folder, and the other way round; and all
    nodes have this process's versions.  Returns what each said; raises EnvironmentFault that names the nodes."""
    nonce = secrets.token_hex(16)
    meeting = run_dir / "logs" / "ray" / f"reach-{nonce[:8]}"
    with disk_errors(meeting):
        meeting.mkdir(parents=True)
        (meeting / "driver").write_text(nonce)
    try:
        answers = dict(_ask_all(meeting, nonce, nodes))
        _refuse_unreachable(run_dir, meeting, nonce, answers)
        _refuse_unlike({"the driver": versions(), **{name: facts["versions"] for name, facts in answers.items()}})
        return answers
    finally:
        shutil.rmtree(meeting, ignore_errors=True)


def _ask_all(meeting: Path, nonce: str, nodes: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    import ray
    from ray.exceptions import RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(answer_from_node)
    asked = {}
    for node in nodes:
        strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[ask.options(scheduling_strategy=strategy).remote(str(meeting), nonce, node["NodeID"])] = node
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=NODE_ANSWER_S)
    if late:
        names = ", ".join(asked[reference]["NodeManagerAddress"] for reference in late)
        raise EnvironmentFault(
            f"no answer within {NODE_ANSWER_S:.0f} s from {names}",
            why="A node must start a process that reads the run folder before training starts.",
            do="Look at the node; `ray status` tells which nodes are alive.",
        )
    for reference in ready:
        node = asked[reference]
        # Several nodes of a test share a machine.
        name = f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})"
        try:
            yield name, ray.get(reference)
        except RayTaskError as error:
            raise EnvironmentFault(
                f"node {name} cannot run this project",
                why=str(error).strip().splitlines()[-1],
                do="Install dist-lm with constraints.txt on every node.",
            ) from error
        except RayError as error:
            raise EnvironmentFault(
                f"node {name} was lost while it was asked",
                why=str(error).strip().splitlines()[0],
                do="`ray status` tells whether it is alive; start again without it, or once it is back.",
            ) from error


def answer_from_node(meeting: str, nonce: str, node_id: str) -> dict[str, Any]:
    """Runs on a node: what it sees of the run folder, its versions, and how far its clock is ahead of the
    storage's."""
    seen, skew_s = "", 0.0
    try:
        if (Path(meeting) / "driver").read_text() != nonce:
            seen = "it reads something else there"
        own = Path(meeting) / node_id
        own.write_text(nonce)
        skew_s = time.time() - own.stat().st_mtime
    except OSError as error:
        seen = f"{error.strerror}: {error.filename}"
    return {"seen": seen, "node_id": node_id, "versions": versions(), "skew_s": skew_s}


def versions() -> dict[str, str]:
    """Versions of the packages that must be alike, without the build (`+cpu`)."""
    found = {}
    for package in _ALIKE:
        try:
            found[package] = version(package).partition("+")[0]
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def _refuse_unreachable(run_dir: Path, meeting: Path, nonce: str, answers: dict[str, dict[str, Any]]) -> None:
    lines = []
    for name, facts in answers.items():
        own = meeting / facts["node_id"]
        if facts["seen"]:
            lines.append(f"{name}: {facts['seen']}")
        elif not own.exists() or own.read_text() != nonce:
            lines.append(f"{name}: what it writes there is not seen by the driver")
    if lines:
        raise EnvironmentFault(
            f"not every node reaches the run folder: {len(lines)} of {len(answers)} do not",
            where=f"run.dir {run_dir}",
            why="\n".join(lines[:4]),
            do="Mount one shared folder at the same path on every node, and put run.dir there.",
        )


def _refuse_unlike(by_node: dict[str, dict[str, str]]) -> None:
    lines = []
    for package in _ALIKE:
        told = {name: found[package] for name, found in by_node.items()}
        if len(set(told.values())) > 1:
            lines.append(f"{package}: " + ", ".join(f"{value} on {name}" for name, value in told.items()))
    if lines:
        raise EnvironmentFault(
            "the nodes of the Ray cluster have different versions",
            why="\n".join(line[:300] for line in lines[:4]),
            do="Install the same constraints.txt on every node.",
        )
