"""What Ray's controller does between two groups of workers, beyond Ray Train's own.

Enters: a copy of this in the controller's process.  Leaves: a fresh view of the cluster, and nodes
that have been asked what the first ones were asked; a count of restarts.
Promises: a new group is asked for on nodes that live; a node that joins later and cannot run this
project is drained and named, or ends the run where it cannot be drained.
"""

from __future__ import annotations

import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    get_or_create_autoscaling_coordinator,
)
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller.state import (
    ReschedulingState,
    RestartingState,
    TrainControllerState,
)
from ray.train.v2._internal.execution.failure_handling.default import _is_preemption_failure
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroupContext
from ray.train.v2.api.exceptions import TrainingFailedError

from dist_lm.cluster import ray_cluster
from dist_lm.cluster.ray_worker import GroupChanges
from dist_lm.disk import write_bytes, write_json
from dist_lm.errors import EnvironmentFault
from dist_lm.run_dir import RunDir

log = logging.getLogger(__name__)

SILENT_S = 1.0
"""A node that takes no connection within this time is believed to be gone."""
GONE_S = 15.0
"""How long to wait until Ray says so, too."""
LOOK_S = 1.0
"""Between two looks for nodes that come, while there are too few."""
_POLL_S = 0.1


class Recovery(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Looks at the nodes before each group of workers but the first."""

    def __init__(self, run_dir: Path, final_errors: Path, *, known: set[str], max_restarts: int) -> None:
        """`known`: ids of nodes that have been asked already."""
        self._run_dir, self._final_errors, self._known = run_dir, final_errors, known
        self._restarts_left = max_restarts
        self._looked_at = 0.0

    def after_controller_start(self, context: TrainRunContext) -> None:
        self._give_back_what_a_killed_driver_holds(context.run_id)
        count_staying_nodes()
        let_workers_save_before_growth(RunDir(self._run_dir).regroup_file)
        look_at_nodes_now()

    def _give_back_what_a_killed_driver_holds(self, run_id: str) -> None:
        """Ray keeps the nodes that an elastic run asked for three minutes longer than its driver lives."""
        path = self._final_errors.parent / "run_id"
        before = path.read_text() if path.exists() else ""
        write_bytes(path, run_id.encode())
        if before:
            get_or_create_autoscaling_coordinator().cancel_request.remote(f"train-{before}")

    def after_controller_state_update(self, before: TrainControllerState, now: TrainControllerState) -> None:
        if not isinstance(now, RestartingState | ReschedulingState):
            return
        # Ray comes by again and again with the same state while there are too few nodes.
        if now is not before:
            if isinstance(now, RestartingState):
                self._charge(now.training_failed_error)
            wait_until_the_dead_are_known()
        elif time.monotonic() - self._looked_at < LOOK_S:
            return
        look_at_nodes_now()
        self._looked_at = time.monotonic()

    def _charge(self, error: TrainingFailedError) -> None:
        """Count a restart, unless the group left by itself.  Raises where none is left: Ray then gives up."""
        failures = getattr(error, "worker_failures", {}).values()
        if any(isinstance(failure, GroupChanges) for failure in failures) or _is_preemption_failure(error):
            return
        if self._restarts_left == 0:
            raise RuntimeError(f"no restart is left after: {error}")
        self._restarts_left -= 1

    def before_worker_group_start(self, _context: WorkerGroupContext) -> None:
        new = [node for node in ray_cluster.living_nodes() if node["NodeID"] not in self._known]
        if not new:
            return
        if self._refused(new):
            # One bad node among many: the others are welcome.
            for node in new:
                error = self._refused([node])
                if error and not drain(node):
                    facts = {"exit_code": error.exit_code, "message": str(error)}
                    write_json(self._final_errors / "joined.json", facts)
                    raise error
        self._known |= {node["NodeID"] for node in new}

    def _refused(self, nodes: list[dict[str, Any]]) -> EnvironmentFault | None:
        try:
            ray_cluster.check_nodes(self._run_dir, nodes)
        except EnvironmentFault as error:
            log.error("%s", error)
            return error
        return None


def look_at_nodes_now() -> None:
    """Ray looks at the nodes every 20 s, and would ask for workers on those that are gone until then."""
    try:
        coordinator = get_or_create_autoscaling_coordinator()
        ray.get(coordinator.get_reserved_resources.remote("", recompute=True), timeout=GONE_S)
    except ray.exceptions.RayError as error:
        log.warning("Ray does not look at the nodes now, but within 20 s: %s", error)


def wait_until_the_dead_are_known() -> None:
    """Until Ray has given up each node that does not answer; GONE_S at the most."""
    deadline = time.monotonic() + GONE_S
    while time.monotonic() < deadline:
        try:
            with ThreadPoolExecutor(max_workers=64) as pool:
                if all(pool.map(_answers, ray_cluster.living_nodes())):
                    return
        except ray.exceptions.RayError as error:
            log.warning("Ray does not tell which nodes live: %s", error)
        time.sleep(_POLL_S)


def count_staying_nodes() -> None:
    """Ray's elastic policy counts a node that is being drained, where nothing is put any more, and for
    up to 20 s one that has gone: the new group would wait for it.  For the controller's process."""
    count_all = ElasticScalingPolicy._count_possible_workers

    def count(policy: Any, reserved: dict[str, Any]) -> int:
        staying = {node["NodeID"] for node in ray_cluster.living_nodes()}
        number: int = count_all(policy, {node: reserved[node] for node in staying & reserved.keys()})
        return number

    ElasticScalingPolicy._count_possible_workers = count


def let_workers_save_before_growth(regroup_file: Path) -> None:
    """Where Ray's elastic policy would end a group, ask its workers to save and leave: no step is lost.

    A group that is to shrink is left alone: its workers hear of a node that goes, and feel one that has
    gone.  For the controller's process.
    """
    decide_by_ray = ElasticScalingPolicy.make_decision_for_running_worker_group

    def decide(policy: Any, worker_group_state: Any, worker_group_status: Any) -> Any:
        decision = decide_by_ray(policy, worker_group_state, worker_group_status)
        if not isinstance(decision, ResizeDecision):
            return decision
        if decision.num_workers > worker_group_state.num_workers:
            regroup_file.touch()
        return NoopDecision()

    ElasticScalingPolicy.make_decision_for_running_worker_group = decide


def _answers(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=SILENT_S).close()
    except OSError:
        return False
    return True


def drain(node: dict[str, Any]) -> bool:
    """Ask for a node's end; False where somebody works on it."""
    from ray.core.generated import autoscaler_pb2

    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_IDLE_TERMINATION")
    accepted, why = client.drain_node(node["NodeID"], reason, "it cannot run dist-lm", 0)
    if not accepted:
        log.error("node %s is not drained: %s", node["NodeManagerAddress"], why)
    return bool(accepted)
