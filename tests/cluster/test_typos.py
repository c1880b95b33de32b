"""A typo in any key of any shipped cluster file is told, with its line."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from dist_lm.cluster.manifests import check_file
from dist_lm.errors import ConfigError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
FILES = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "cluster").rglob("*.yaml"))

FREE = {
    ("available_node_types", "gpu_spot"): "a name that the user gives; nothing refers to it",
    ("available_node_types", "gpu_on_demand"): "a name that the user gives; nothing refers to it",
    ("labels", "market"): "a label that the user gives, for ray.label_selector of a recipe",
}
"""Keys that may have any name: every other key must be caught."""


@dataclass(frozen=True)
class Key:
    """A key in the text of a file: `text[begin:end]`, inside the section `parent`."""

    parent: str
    name: str
    begin: int
    end: int


def keys(node: yaml.Node, parent: str = "") -> Iterator[Key]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            quotes = 1 if key.style else 0
            yield Key(parent, key.value, key.start_mark.index + quotes, key.end_mark.index - quotes)
            yield from keys(value, key.value)
    elif isinstance(node, yaml.SequenceNode):
        for element in node.value:
            yield from keys(element, parent)


def all_keys(text: str) -> list[Key]:
    found = [key for document in yaml.compose_all(text, yaml.SafeLoader) for key in keys(document)]
    # YAML inside YAML: the keys of the runtime_env.
    for key in [key for key in found if key.name == "runtimeEnvYAML"]:
        for inner in ("env_vars", "RAY_JOB_STOP_WAIT_TIME_S", "RAY_DEDUP_LOGS"):
            begin = text.index(inner, key.end)
            found.append(Key("runtimeEnvYAML", inner, begin, begin + len(inner)))
    return found


def typos(word: str) -> Iterator[str]:
    yield word + word[-1]
    if len(word) > 1:
        yield word[:-1]
        swapped = word[1] + word[0] + word[2:]
        if swapped != word:
            yield swapped


def problems(path: Path) -> Iterator[str]:
    """Of the file, and then of the kustomization beside it."""
    beside = path.parent / "kustomization.yaml"
    for file in dict.fromkeys([path, beside] if beside.exists() else [path]):
        try:
            yield from (f"{file.name}:{problem.line}: {problem}" for problem in check_file(file))
        except ConfigError as error:
            yield str(error)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(REPOSITORY / "cluster", tmp_path / "cluster")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", FILES, ids=str)
def test_every_typo_in_a_key_is_caught(file: Path, tree: Path) -> None:
    path = tree / file
    text = path.read_text()
    assert [*problems(path)] == []
    passed = []
    for key in all_keys(text):
        if (key.parent, key.name) in FREE:
            continue
        for typo in typos(key.name):
            path.write_text(text[: key.begin] + typo + text[key.end :])
            if next(problems(path), None) is None:
                passed.append(f"{key.parent}.{typo}")
    assert passed == []


def test_there_are_many_keys_and_few_free_ones() -> None:
    found = [key for file in FILES for key in all_keys((REPOSITORY / file).read_text())]
    free = [key for key in found if (key.parent, key.name) in FREE]
    assert len(found) > 500
    assert len(free) <= 12
