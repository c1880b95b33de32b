"""Kubernetes manifests: the types of the API and of KubeRay, and keys that are free but have a meaning.

Enters: one document.  Leaves: problems.  Promises: a kind that is not known is a problem, not a pass.
"""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from dist_lm.cluster.kuberay import check_cluster, check_job, check_name
from dist_lm.cluster.typed_yaml import (
    Problem,
    check,
    elements,
    get,
    is_near,
    items,
    line_of,
    load_types,
    suggestion,
    text_of,
)

KINDS = {
    ("ray.io/v1", "RayCluster"): "RayCluster",
    ("ray.io/v1", "RayJob"): "RayJob",
    ("v1", "PersistentVolumeClaim"): "PersistentVolumeClaim",
    ("v1", "Service"): "Service",
    ("v1", "ConfigMap"): "ConfigMap",
    ("v1", "Secret"): "Secret",
    ("v1", "ServiceAccount"): "ServiceAccount",
    ("v1", "Namespace"): "Namespace",
    ("networking.k8s.io/v1", "NetworkPolicy"): "NetworkPolicy",
}
RESOURCES = (
    "cpu",
    "memory",
    "storage",
    "ephemeral-storage",
    "hugepages-2Mi",
    "hugepages-1Gi",
    "nvidia.com/gpu",
    "amd.com/gpu",
    "habana.ai/gaudi",
    "google.com/tpu",
    "aws.amazon.com/neuron",
    "aws.amazon.com/neuroncore",
    "vpc.amazonaws.com/efa",
    "rdma/ib",
)
LABELS = (
    *(f"app.kubernetes.io/{word}" for word in ("name", "instance", "version", "component", "part-of", "managed-by")),
    "kubernetes.io/metadata.name",
    "kubernetes.io/hostname",
    "kubernetes.io/arch",
    "kubernetes.io/os",
    "node.kubernetes.io/instance-type",
    "topology.kubernetes.io/zone",
    "topology.kubernetes.io/region",
    "cloud.google.com/gke-spot",
    "cloud.google.com/gke-accelerator",
    "cloud.google.com/gke-nodepool",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
    "kubernetes.azure.com/scalesetpriority",
    "nvidia.com/gpu.product",
    "ray.io/cluster",
    "ray.io/node-type",
    "ray.io/group",
    "ray.io/gpu-family",
    "kueue.x-k8s.io/queue-name",
)
"""Labels with a meaning: one that is near to them is a typo, any other is the user's own."""


def check_document(document: yaml.Node) -> Iterator[Problem]:
    """What is wrong with one manifest."""
    version, kind = text_of(get(document, "apiVersion")), text_of(get(document, "kind"))
    if (version, kind) not in KINDS:
        known = [f"{other} {name}" for other, name in KINDS]
        do = suggestion(f"{version} {kind}", known)
        yield Problem(line_of(document), f"`apiVersion: {version}`, `kind: {kind}` is no kind that is checked", do)
        return
    yield from check(document, KINDS[version, kind], load_types("kubernetes", "kuberay"), name=kind)
    yield from _check_words(document)
    if kind == "RayJob":
        yield from check_name(document)
        yield from check_job(get(document, "spec"))
    elif kind == "RayCluster":
        yield from check_name(document)
        yield from check_cluster(get(document, "spec"))


def _check_words(node: yaml.Node, inside: str = "") -> Iterator[Problem]:
    """Free keys that have a meaning all the same: resources and labels."""
    for key, value in items(node):
        if inside in ("limits", "requests") and key.value not in RESOURCES:
            do = suggestion(key.value, RESOURCES)
            # A device plugin may bring any name of the form domain/device.
            if "/" not in key.value or (do and is_near(key.value, RESOURCES)):
                yield Problem(line_of(key), f"`{key.value}` is no resource", do)
        elif inside in ("labels", "matchLabels", "nodeSelector") and is_near(key.value, LABELS):
            do = suggestion(key.value, LABELS)
            yield Problem(line_of(key), f"`{key.value}` is near to a label with a meaning", do)
        yield from _check_words(value, key.value)
    for element in elements(node):
        yield from _check_words(element, inside)
