"""YAML text as a tree in which every value knows where it stands.

Enters: a YAML file, or the right side of an override.  Leaves: nested entries of value and place.
Promises: duplicate keys and keys that are not text are refused with file and line; `1e-4` is a
number, as people expect and YAML 1.1 does not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dist_lm.errors import ConfigError

_MERGE_TAG = "tag:yaml.org,2002:merge"


@dataclass(frozen=True)
class Entry:
    """A value and the place that said it.  The value of a section is a Tree."""

    value: Any
    place: str


Tree = dict[str, Entry]


class _Loader(yaml.SafeLoader):
    """Plain data only; no tag can create an object."""


# YAML 1.1 wants a dot in a float: without this, `1e-4` would be text wherever no type is known.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def read_tree(path: Path, *, said_at: str = "") -> Tree:
    """The file's keys.  `said_at` is the place that named the file, for the message if it is missing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = {file.stem: file for file in sorted(path.parent.glob("*.y*ml"))}
        close = difflib.get_close_matches(path.stem, siblings, n=1)
        do = f"did you mean {siblings[close[0]]}?" if close else "Paths count from the working directory."
        raise ConfigError(f"there is no file {path}", where=said_at, do=do) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}", where=said_at, why=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", where=said_at, why=str(error)) from None
    node, loader = _compose(text, str(path))
    if node is None:
        raise ConfigError(f"{path} is empty", do="A run needs at least task, data, batch, optim and run.")
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{path} is not a set of `key: value` lines", where=_place(str(path), node))
    return _tree(node, loader, str(path), ())


def parse_value(text: str, place: str) -> Entry:
    """The right side of an override, read as YAML; everything in it has the same place."""
    node, loader = _compose(text, place)
    if node is None:
        return Entry(None, place)
    entry = _entry(node, loader, place, ())
    return _moved(entry, place)


def merge(base: Tree, over: Tree) -> Tree:
    """Sections merge key by key, other values replace; another task replaces the whole section."""
    merged = dict(base)
    for key, entry in over.items():
        below = base.get(key)
        both_sections = below is not None and isinstance(below.value, dict) and isinstance(entry.value, dict)
        if below is None or not both_sections or (key == "task" and _changes_name(below.value, entry.value)):
            merged[key] = entry
        else:
            merged[key] = Entry(merge(below.value, entry.value), entry.place)
    return merged


def find(tree: Tree, path: Sequence[str]) -> Iterator[Entry]:
    """The entries along `path`, as far as they exist."""
    for part in path:
        if part not in tree:
            return
        yield tree[part]
        tree = tree[part].value if isinstance(tree[part].value, dict) else {}


def plain(value: Any) -> Any:
    """The bare value of a tree."""
    if isinstance(value, dict):
        return {key: plain(entry.value) for key, entry in value.items()}
    return value


def _changes_name(below: Tree, above: Tree) -> bool:
    names = [section["name"].value for section in (below, above) if "name" in section]
    return len(names) == 2 and names[0] != names[1]


def _moved(entry: Entry, place: str) -> Entry:
    if isinstance(entry.value, dict):
        return Entry({key: _moved(inner, place) for key, inner in entry.value.items()}, place)
    return Entry(entry.value, place)


def _compose(text: str, source: str) -> tuple[yaml.Node | None, _Loader]:
    loader = _Loader(text)
    try:
        return loader.get_single_node(), loader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = source if mark is None or source.startswith("override") else f"{source}:{mark.line + 1}"
        why = "; ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError("this is not YAML", where=where, why=why, do="Text with : # @ % or ` needs quotes.") from None
    except yaml.YAMLError as error:
        raise ConfigError("this is not YAML", where=source, why=str(error).splitlines()[0]) from None


def _place(source: str, node: yaml.Node) -> str:
    return f"{source}:{node.start_mark.line + 1}"


def _entry(node: yaml.Node, loader: _Loader, source: str, above: tuple[yaml.Node, ...]) -> Entry:
    place = _place(source, node)
    if any(node is other for other in above):
        raise ConfigError("an alias contains itself", where=place)
    if isinstance(node, yaml.MappingNode):
        return Entry(_tree(node, loader, source, (*above, node)), place)
    try:
        return Entry(loader.construct_object(node, deep=True), place)
    except (yaml.YAMLError, ValueError) as error:
        why = getattr(error, "problem", None) or str(error)
        raise ConfigError("a value that cannot be read", where=place, why=str(why)) from None


def _tree(node: yaml.MappingNode, loader: _Loader, source: str, above: tuple[yaml.Node, ...]) -> Tree:
    tree: Tree = {}
    for key_node, value_node in node.value:
        place = _place(source, key_node)
        if key_node.tag == _MERGE_TAG:
            raise ConfigError("`<<` is not supported", where=place, do="Use `extends: other.yaml`.")
        key = _entry(key_node, loader, source, above).value
        if not isinstance(key, str):
            raise ConfigError(
                f"a key that is not text: {getattr(key_node, 'value', key)}",
                where=place,
                do="Put it in quotes.",
            )
        if key in tree:
            why = f"The first is at {tree[key].place}."
            raise ConfigError(f"`{key}` is there twice", where=place, why=why, do="Keep one of them.")
        # The key's line is what a person looks for, also where the value begins below it.
        tree[key] = Entry(_entry(value_node, loader, source, above).value, place)
    return tree
