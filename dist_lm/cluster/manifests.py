"""Check cluster files without a cloud: each mistake with its line, and a suggestion where one is near.

Enters: YAML files of `ray up`, Kubernetes (KubeRay), Kustomize and SkyPilot.  Leaves: problems.
Promises: no network, no credentials, nothing started.  Keys are checked against the APIs' own models
(schemas/*.json tell their source), so that a typo costs a second and not a cluster.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from dist_lm.cluster.kubernetes import check_document
from dist_lm.cluster.kustomize import check_kustomization, is_json_patch
from dist_lm.cluster.ray_launcher import check_launcher
from dist_lm.cluster.typed_yaml import (
    Problem,
    check,
    get,
    items,
    line_of,
    load_types,
    read_documents,
    says,
    text_of,
)
from dist_lm.errors import ConfigError

_LAUNCHER_KEYS = {"cluster_name", "provider", "available_node_types", "head_node_type"}
_SKY_KEYS = {"resources", "run", "setup", "num_nodes", "workdir", "file_mounts"}
MIN_KEYS = 2
"""How many of these keys make a file one of `ray up` or SkyPilot: a typo must not change its kind."""


def check_file(path: Path) -> list[Problem]:
    """The problems of one file, in the order of its lines.

    Raises ConfigError where the file cannot be read, is not YAML, or is of no known kind.
    """
    documents = read_documents(path)
    if not documents:
        raise ConfigError(f"{path} is empty")
    problems: list[Problem] = []
    for document in documents:
        problems += _check_document(document, path)
    return sorted(set(problems))


def _check_document(document: yaml.Node, path: Path) -> Iterator[Problem]:
    if path.name in ("kustomization.yaml", "kustomization.yml"):
        yield from check_kustomization(document, path)
    elif is_json_patch(document):
        # Its kustomization.yaml knows the resource that it changes, and checks paths and values.
        yield from check(document, "[JsonPatchStep]", load_types("kustomize"), name="patch")
    elif isinstance(document, yaml.MappingNode):
        keys = {key.value for key, _ in document.value}
        if keys & {"apiVersion", "kind"} or len(keys & {"metadata", "spec"}) == MIN_KEYS:
            yield from check_document(document)
        elif len(keys & _LAUNCHER_KEYS) >= MIN_KEYS:
            yield from check_launcher(document, path)
        elif len(keys & _SKY_KEYS) >= MIN_KEYS:
            yield from _check_sky(document)
        else:
            raise _unknown(path)
    else:
        raise _unknown(path)


def _unknown(path: Path) -> ConfigError:
    return ConfigError(
        f"{path} is no cluster file that dist-lm knows",
        why="Known are `ray up` clusters, Kubernetes manifests, kustomizations with JSON patches, SkyPilot tasks.",
    )


def _check_sky(document: yaml.Node) -> Iterator[Problem]:
    yield from check(document, "Task", load_types("skypilot"), name="task")
    said = text_of(get(document, "run")) + text_of(get(document, "setup"))
    for key, _ in items(get(document, "envs")):
        if not says(said, f"${key.value}") and not says(said, f"${{{key.value}"):
            yield Problem(line_of(key), f"no command uses the variable `{key.value}`")
    for key, _ in items(get(document, "volumes")):
        if not says(said, key.value):
            yield Problem(line_of(key), f"no command uses the volume at `{key.value}`")
