"""Kustomizations: their own keys, the files they name, and what their JSON patches do to a resource.

Enters: the document of a kustomization.yaml.  Leaves: problems.
Promises: a patch is applied to the resource it names and the result is checked, as `kubectl kustomize`
and the API server would.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from dist_lm.cluster.kubernetes import check_document
from dist_lm.cluster.typed_yaml import (
    Problem,
    check,
    elements,
    get,
    line_of,
    load_types,
    plain,
    read_documents,
    suggestion,
    text_of,
)

NAMES = ("kustomization.yaml", "kustomization.yml")


def is_json_patch(document: yaml.Node) -> bool:
    steps = elements(document)
    return bool(steps) and all(get(step, "path") is not None or get(step, "op") is not None for step in steps)


def check_kustomization(document: yaml.Node, path: Path) -> Iterator[Problem]:
    yield from check(document, "Kustomization", load_types("kubernetes", "kustomize"), name="kustomization")
    for element in elements(get(document, "resources")):
        if not (path.parent / text_of(element)).exists():
            do = suggestion(text_of(element), [entry.name for entry in path.parent.iterdir()])
            yield Problem(line_of(element), f"there is no {text_of(element)} beside {path.name}", do)
    resources = list(_resources(path))
    for patch in elements(get(document, "patches")):
        yield from _check_patch(patch, path, resources)


def _resources(path: Path) -> Iterator[yaml.Node]:
    """The documents of all resources, those of bases before them."""
    for document in read_documents(path):
        for element in elements(get(document, "resources")):
            found = path.parent / text_of(element)
            if found.is_dir():
                found = next((found / name for name in NAMES if (found / name).exists()), found)
                yield from _resources(found) if found.is_file() else ()
            elif found.exists():
                yield from read_documents(found)


def _check_patch(patch: yaml.Node, path: Path, resources: list[yaml.Node]) -> Iterator[Problem]:
    named = get(patch, "path")
    file = path.parent / text_of(named)
    if named is None or not file.is_file():
        if get(patch, "patch") is None:
            yield Problem(line_of(patch), f"there is no patch {text_of(named)}", "name a file beside this one")
        return
    target = get(patch, "target")
    aimed = [resource for resource in resources if _is_target(resource, target)]
    if not aimed:
        kinds = [f"{text_of(get(item, 'kind'))} {text_of(get(item, 'metadata', 'name'))}" for item in resources]
        yield Problem(line_of(patch), "the target is none of the resources", f"they are {', '.join(kinds)}")
    for steps in read_documents(file):
        if not is_json_patch(steps):
            continue
        for resource in aimed:
            yield from _check_steps(steps, resource, line_of(patch), file)


def _is_target(resource: yaml.Node, target: yaml.Node | None) -> bool:
    group, _, version = text_of(get(resource, "apiVersion")).rpartition("/")
    facts = {
        "group": group,
        "version": version,
        "kind": text_of(get(resource, "kind")),
        "name": text_of(get(resource, "metadata", "name")),
    }
    wanted = {name: text_of(get(target, name)) for name in facts}
    return all(not value or facts[name] == value for name, value in wanted.items())


def _check_steps(steps: yaml.Node, resource: yaml.Node, line: int, file: Path) -> Iterator[Problem]:
    value = copy.deepcopy(plain(resource))
    for step in elements(steps):
        problem = _apply(plain(step), value)
        if problem:
            yield Problem(line, f"{file.name}:{line_of(step)}: {problem}")
            return
    # The result has no lines of its own: it is written, read, and each problem told at the patch.
    for result in yaml.compose_all(yaml.safe_dump(value), yaml.SafeLoader):
        for found in check_document(result):
            yield Problem(line, f"after {file.name}: {found.text}", found.do)


def _apply(step: dict[str, Any], value: Any) -> str:
    """Change `value` as one step of RFC 6902 says; what is wrong with the step, or nothing."""
    parts = [part.replace("~1", "/").replace("~0", "~") for part in str(step.get("path", "")).split("/")[1:]]
    if not parts:
        return "a path begins with / and names a key"
    for part in parts[:-1]:
        if isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            known = value if isinstance(value, dict) else []
            return f"{step['path']}: there is no `{part}`. {suggestion(part, known)}".strip()
    last: Any = parts[-1]
    if isinstance(value, list):
        if last != "-" and not (last.isdecimal() and int(last) <= len(value)):
            return f"{step['path']}: `{last}` is no place in a list of {len(value)}"
        last = len(value) if last == "-" else int(last)
    there = last < len(value) if isinstance(value, list) else last in value
    operation = step.get("op")
    if operation in ("replace", "remove") and not there:
        known = value if isinstance(value, dict) else []
        return f"{step['path']}: there is no `{last}`. {suggestion(str(last), known)}".strip()
    if operation == "remove":
        del value[last]
    elif operation in ("add", "replace"):
        if "value" not in step:
            return f"{step['path']}: `{operation}` needs a value"
        if isinstance(value, list) and operation == "add":
            value.insert(last, step["value"])
        else:
            value[last] = step["value"]
    return ""
