"""How many workers of what a run is given on a Ray cluster.

Enters: the `ray:` section.  Leaves: a Scale; or an error that tells what each node has.
Promises: a cluster that is too small, and stays so, is refused before anything of the run starts; what
Ray's autoscaler can bring counts, and only the autoscaler itself is asked for that.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from dist_lm.cluster.ray_cluster import living_nodes
from dist_lm.config_ray import RaySection
from dist_lm.errors import EnvironmentFault

log = logging.getLogger(__name__)

AUTOSCALER_ANSWER_S = 30.0
"""Ray's autoscaler looks every five seconds."""
_POLL_S = 0.2
_ACCELERATOR = "accelerator_type:"


@dataclass(frozen=True)
class Scale:
    """How many workers of what a run is given."""

    min_workers: int
    max_workers: int
    resources_per_worker: dict[str, float]

    @property
    def use_gpu(self) -> bool:
        return self.resources_per_worker.get("GPU", 0) > 0

    @property
    def elastic(self) -> bool:
        return self.min_workers < self.max_workers


def choose_scale(section: RaySection) -> Scale:
    """How many workers there will be.  Raises EnvironmentFault where the cluster cannot give them."""
    nodes, wanted = living_nodes(), section.workers
    least = wanted.min if wanted else 1
    for resources in _choices(section, nodes):
        now = room(section, nodes, resources)
        if now >= least:
            return Scale(least, wanted.max, resources) if wanted else Scale(now, now, resources)
    if wanted is None:
        raise EnvironmentFault(
            "the Ray cluster has no room for a worker, and the run does not say how many it wants",
            where="ray.workers",
            why=_rooms(section, nodes, resources),
            do="Write ray.workers=8, or {min: 4, max: 16}: an autoscaler then brings their nodes.",
        )
    for resources in _choices(section, nodes):
        if autoscaler_brings(section, least, resources):
            log.warning("there is room for %d of %d workers now: the autoscaler brings nodes", now, wanted.max)
            return Scale(least, wanted.max, resources)
    raise EnvironmentFault(
        f"the Ray cluster has room for {now} of at least {least} workers",
        where="ray.workers",
        why=_rooms(section, nodes, resources),
        do="Lower ray.workers.min, or add nodes: no autoscaler brings them.",
    )


def _choices(section: RaySection, nodes: list[dict[str, Any]]) -> Iterator[dict[str, float]]:
    """What a worker may be given, the best first."""
    if section.resources_per_worker:
        yield dict(section.resources_per_worker)
        return
    yield {"GPU": 1.0}
    if not section.accelerator_type and not any(node["Resources"].get("GPU", 0) for node in nodes):
        yield {"CPU": 1.0}


def _needs(section: RaySection, resources: dict[str, float]) -> dict[str, float]:
    """What a node must have for a worker."""
    return {**resources, **({_ACCELERATOR + section.accelerator_type: 0.001} if section.accelerator_type else {})}


def room(section: RaySection, nodes: list[dict[str, Any]], resources: dict[str, float]) -> int:
    """How many workers fit on the nodes that there are."""
    needs = _needs(section, resources)
    return sum(_fit(node["Resources"], needs) for node in nodes if _has_labels(node, section.label_selector))


def _fit(has: dict[str, float], needs: dict[str, float]) -> int:
    # Ray counts in units of 1e-4: without the slack, 0.3 fits into 0.9 only twice.
    return int(min(has.get(name, 0.0) / amount + 1e-6 for name, amount in needs.items()))


def _has_labels(node: dict[str, Any], wanted: dict[str, str]) -> bool:
    labels = node.get("Labels") or {}
    return all(labels.get(name) == value for name, value in wanted.items())


def _rooms(section: RaySection, nodes: list[dict[str, Any]], resources: dict[str, float]) -> str:
    lines = []
    for node in nodes[:4]:
        has = {name: node["Resources"].get(name, 0) for name in _needs(section, resources)}
        label = "" if _has_labels(node, section.label_selector) else f", lacks the labels {section.label_selector}"
        lines.append(f"{node['NodeManagerAddress']}: {has}{label}")
    return "\n".join([*lines, *([f"... and {len(nodes) - 4} nodes more"] if len(nodes) > 4 else [])])


def autoscaler_brings(section: RaySection, number: int, resources: dict[str, float]) -> bool:
    """Whether Ray's autoscaler finds room for so many workers on nodes that it has, or may add.

    Ray does not tell what an autoscaler may add, or whether there is one: it is asked for a placement
    group, as Ray Train asks later, until its state says that it has seen the request.
    """
    import ray
    from ray.autoscaler.v2.utils import is_autoscaler_v2
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
    from ray.util import placement_group, remove_placement_group

    client = ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address)
    if not is_autoscaler_v2(fetch_from_server=True, gcs_client=client):
        return False
    labels = [section.label_selector] * number if section.label_selector else None
    bundles = [_needs(section, resources)] * number
    group = placement_group(bundles, strategy=section.placement, bundle_label_selector=labels)
    try:
        asked_in = None
        deadline = time.monotonic() + AUTOSCALER_ANSWER_S
        while time.monotonic() < deadline:
            status = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=AUTOSCALER_ANSWER_S))
            load, answer = status.cluster_resource_state, status.autoscaling_state
            if asked_in is None and _names(load.pending_gang_resource_requests, group.id.hex()):
                asked_in = load.cluster_resource_state_version
            if asked_in is not None and answer.last_seen_cluster_resource_state_version >= asked_in:
                return not _names(answer.infeasible_gang_resource_requests, group.id.hex())
            time.sleep(_POLL_S)
    finally:
        remove_placement_group(group)
    log.warning("Ray's autoscaler does not answer within %.0f s", AUTOSCALER_ANSWER_S)
    return False


def _names(requests: Any, group: str) -> bool:
    return any(group in request.details for request in requests)
