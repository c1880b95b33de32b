"""Files of `ray up`: Ray's own schema, and what it leaves open: provider, node_config, commands.

Enters: one document.  Leaves: problems.
Promises: `node_config` is checked against the cloud's API model (EC2 RunInstances, Compute Engine's
Instance, the parameters of Ray's Azure template); Ray itself passes any typo there.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from dist_lm.cluster.ray_options import wrong_options
from dist_lm.cluster.typed_yaml import (
    Problem,
    check,
    elements,
    get,
    is_near,
    items,
    line_of,
    load_types,
    plain,
    says,
    suggestion,
    text_of,
    unknown_key,
)

PROVIDERS = {"aws": "ProviderAws", "gcp": "ProviderGcp", "azure": "ProviderAzure", "local": "ProviderLocal"}
_NODES = {"aws": ("aws", "RunInstancesRequest"), "gcp": ("gcp", "Instance"), "azure": ("ray_launcher", "AzureNode")}
_RESOURCES = ("CPU", "GPU", "TPU", "NPU", "HPU", "memory", "object_store_memory")
_COMMANDS = ("head_start_ray_commands", "worker_start_ray_commands")


def check_launcher(document: yaml.Node, path: Path) -> Iterator[Problem]:
    provider = text_of(get(document, "provider", "type"))
    if provider not in PROVIDERS:
        do = suggestion(provider, PROVIDERS) or f"known are {', '.join(PROVIDERS)}"
        yield Problem(line_of(document), f"`provider.type: {provider}` cannot be checked", do)
    else:
        kind = PROVIDERS[provider]
        section = get(document, "provider")
        if section is not None:
            yield from check(section, kind, load_types("ray_launcher"), name="provider")
    yield from _check_schema(document, provider)
    yield from _check_node_types(document, provider)
    yield from _check_file_mounts(document)
    for name in _COMMANDS:
        for command in elements(get(document, name)):
            for problem in wrong_options(text_of(command)):
                yield Problem(line_of(command), problem)


@cache
def _ray_schema() -> dict[str, Any]:
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    schema: dict[str, Any] = json.loads((Path(found.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    return schema


def _check_schema(document: yaml.Node, provider: str) -> Iterator[Problem]:
    value = plain(document)
    if provider == "local":
        # Ray moves it into the one node type that a local cluster has.
        value.pop("min_workers", None)
    for error in jsonschema.Draft7Validator(_ray_schema()).iter_errors(value):
        place = list(error.absolute_path)
        node = get(document, *place) or document
        if error.validator == "additionalProperties":
            known = error.schema.get("properties", {})
            for key, _ in items(node):
                if key.value not in known and not (provider == "local" and key.value == "min_workers"):
                    yield unknown_key(key, known, f"`{place[-1]}`" if place else "a cluster file")
        else:
            name = ".".join(str(part) for part in place)
            yield Problem(line_of(node), f"{name + ': ' if name else ''}{error.message.splitlines()[0][:120]}")


def _check_node_types(document: yaml.Node, provider: str) -> Iterator[Problem]:
    types = get(document, "available_node_types")
    head = get(document, "head_node_type")
    if provider == "local":
        for node in (types, head):
            if node is not None:
                yield Problem(line_of(node), "the local provider has one kind of node, and takes no node types")
        return
    names = [key.value for key, _ in items(types)]
    if text_of(head) not in names:
        place = line_of(head) if head is not None else line_of(document)
        yield Problem(place, f"`head_node_type: {text_of(head)}` is no node type", suggestion(text_of(head), names))
    for _, node_type in items(types):
        yield from _check_node_type(node_type, provider)


def _check_node_type(node_type: yaml.Node, provider: str) -> Iterator[Problem]:
    least, most = (
        plain(node) if node else None for node in (get(node_type, "min_workers"), get(node_type, "max_workers"))
    )
    if isinstance(least, int) and isinstance(most, int) and least > most:
        yield Problem(line_of(node_type), f"min_workers {least} are more than max_workers {most}")
    for key, _ in items(get(node_type, "resources")):
        if is_near(key.value, _RESOURCES, cutoff=0.6):
            yield Problem(
                line_of(key), f"`{key.value}` is near to a resource of Ray", suggestion(key.value, _RESOURCES)
            )
    node_config = get(node_type, "node_config")
    if node_config is None or provider not in _NODES:
        return
    table, kind = _NODES[provider]
    types = load_types(table)
    # Ray's own examples write a list of one, which Google's API takes as well.
    yield from check(node_config, kind, types, name="node_config")
    if provider == "aws":
        yield from _check_instance_type(get(node_config, "InstanceType"))
    if provider == "gcp" and get(node_config, "machineType") is None:
        yield Problem(line_of(node_config), "node_config lacks `machineType`")


def _check_instance_type(node: yaml.Node | None) -> Iterator[Problem]:
    """A family that is known, in a size that is not: newer families than our table pass."""
    known = load_types("aws")["InstanceTypes"]
    name = text_of(node)
    if node is None or name in known:
        return
    family = name.partition(".")[0]
    if "." not in name or any(other.startswith(f"{family}.") for other in known) or is_near(name, known):
        yield Problem(line_of(node), f"EC2 has no instance type `{name}`", suggestion(name, known))


def _check_file_mounts(document: yaml.Node) -> Iterator[Problem]:
    said = " ".join(
        text_of(command)
        for key, commands in items(document)
        if key.value.endswith("commands")
        for command in elements(commands)
    )
    for remote, local in items(get(document, "file_mounts")):
        if not text_of(local).startswith("~") and not Path(text_of(local)).exists():
            yield Problem(line_of(local), f"file_mounts: there is no `{text_of(local)}` here")
        if not says(said, remote.value) and remote.value != text_of(local):
            yield Problem(line_of(remote), f"file_mounts: no command uses `{remote.value}`")
