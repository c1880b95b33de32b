"""Spare workers: processes of Ray on every node that have imported everything and wait for the next group.

Enters: a group of workers that trains.  Leaves: as many processes in waiting on each node as it may be
given ranks; Ray takes them for the next group, and ends them with the job.
Promises: without them a restart is slower and nothing else; a node never keeps more than it may need.

Ray starts a process for each actor, and ends it with the actor: after a fault every rank would import
torch and DeepSpeed anew, on all nodes at once.  A worker that was started ahead of time and has not
run anything yet is taken by the next actor of the same job and runtime environment.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private.grpc_utils import init_grpc_channel
from ray._private.ray_constants import WORKER_PROCESS_SETUP_HOOK_ENV_VAR
from ray._private.runtime_env.setup_hook import decode_function_key, get_import_export_timeout
from ray._private.utils import get_runtime_env_info
from ray.core.generated.common_pb2 import PYTHON
from ray.core.generated.node_manager_pb2 import PrestartWorkersRequest
from ray.core.generated.node_manager_pb2_grpc import NodeManagerServiceStub
from ray.runtime_env import RuntimeEnv
from ray.train.v2._internal.execution.callback import WorkerGroupCallback
from ray.train.v2._internal.execution.worker_group import WorkerGroup, WorkerGroupContext, WorkerGroupPollStatus

from dist_lm import lease
from dist_lm.cluster.rank_process import PRELOADED
from dist_lm.cluster.ray_cluster import living_nodes
from dist_lm.cluster.ray_scale import Scale, room
from dist_lm.config_ray import RaySection
from dist_lm.run_dir import RunDir

log = logging.getLogger(__name__)

_OF_A_RANK = ("dist_lm.cluster.ray_backend", "dist_lm.cluster.ray_worker")
"""Where a worker learns its rank: with them comes all of Ray Train."""
ANSWER_S = 5.0
KEPT_S = 365 * 24 * 3600
"""Ray ends idle processes of a job after this time."""


def runtime_env(*, cpu: bool) -> dict[str, Any]:
    """What the workers of a run are started with: each process first imports what training needs.

    Ray allows its set-up hook for whole jobs only, where the driver and Ray's own actors would import
    everything, too; underneath it is a variable that names a function which all workers can fetch.
    With a GPU that is torch only: which GPUs a worker may see is known when it gets its rank, and DeepSpeed
    looks at them when it is imported.
    """
    hook = _import_of(*_OF_A_RANK, PRELOADED, DS_ACCELERATOR="cpu") if cpu else _import_of(*_OF_A_RANK, "torch")
    manager = ray._private.worker.global_worker.function_actor_manager
    key = manager.export_setup_func(hook, timeout=get_import_export_timeout())
    return {"env_vars": {WORKER_PROCESS_SETUP_HOOK_ENV_VAR: decode_function_key(key)}}


def _import_of(*modules: str, **variables: str) -> Callable[[], None]:
    # A function of a module would be pickled by its name, and Ray starts a worker whose hook fails, as it
    # does where dist_lm is broken, again and again.
    def import_first() -> None:
        import contextlib
        import importlib
        import os

        os.environ.update(variables)
        # Training itself tells what is wrong here, in its own words.
        with contextlib.suppress(Exception):
            importlib.import_module("dist_lm.garbage").collect_seldom()
            for module in modules:
                importlib.import_module(module)

    return import_first


class Spares(WorkerGroupCallback):  # type: ignore[misc]
    """In the controller's process: how many wait on which node."""

    def __init__(self, run_dir: Path, section: RaySection, scale: Scale) -> None:
        self._run_dir, self._section, self._scale = RunDir(run_dir), section, scale
        self._waiting: Counter[str] = Counter()
        self._info: Any = None
        self._attempt_before, self._due = 0, False

    def before_worker_group_start(self, _context: WorkerGroupContext) -> None:
        self._attempt_before = self._lease().get("attempt", 0)
        self._due = False

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        """The group has used what waited on its nodes."""
        # Never below none: the first group had none to take.
        self._waiting = self._waiting - Counter(worker.metadata.node_id for worker in worker_group.get_workers())
        text = worker_group.execute_single(0, _own_runtime_env)
        self._info = get_runtime_env_info(RuntimeEnv.deserialize(text))
        # Ray compares the text.
        self._info.serialized_runtime_env = text
        self._due = True

    def after_worker_group_poll_status(self, _status: WorkerGroupPollStatus) -> None:
        """Once the group trains, start what is missing on each node."""
        if not self._due or not self._trains():
            return
        self._due = False
        for node in living_nodes():
            wanted = min(room(self._section, [node], self._scale.resources_per_worker), self._scale.max_workers)
            missing = wanted - self._waiting[node["NodeID"]]
            if missing > 0 and self._start(node, missing):
                self._waiting[node["NodeID"]] += missing

    def _trains(self) -> bool:
        """Until then the group itself needs the cores."""
        held = self._lease()
        return bool(held.get("attempt", 0) > self._attempt_before and held.get("useful_s", 0) > 0)

    def _lease(self) -> dict[str, Any]:
        try:
            return lease.read(self._run_dir.leases)
        except OSError as error:
            # Training, which needs the storage, tells it; the controller only looks.
            log.warning("the run's lease cannot be read now: %s", error)
            return {}

    def _start(self, node: dict[str, Any], number: int) -> bool:
        request = PrestartWorkersRequest(
            language=PYTHON,
            job_id=bytes.fromhex(ray.get_runtime_context().get_job_id()),
            runtime_env_info=self._info,
            keep_alive_duration_secs=KEPT_S,
            num_workers=number,
        )
        address = f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"
        try:
            with init_grpc_channel(address) as channel:
                NodeManagerServiceStub(channel).PrestartWorkers(request, timeout=ANSWER_S)
        except grpc.RpcError as error:
            log.warning("no spare workers on %s: %s", address, error.code())
            return False
        return True


def _own_runtime_env() -> str:
    text: str = ray.get_runtime_context().get_runtime_env_string()
    return text
