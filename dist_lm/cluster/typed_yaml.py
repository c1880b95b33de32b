"""YAML text against the types of an API: every problem has a line, and a suggestion where one is near.

Enters: YAML nodes, which know where they stand, and tables of types (schemas/*.json).  Leaves:
problems.  Promises: nothing is opened but the file; a key that no type has is a problem.

A table maps a type's name to its fields and their kinds.  A kind is `string`, `integer`, `number`,
`boolean`, `quantity` (a number, or text such as 64Gi), `any`, `=|A|B` (one of A and B), `[K]` (a list
of K), `{K}` (free keys, values of K) or the name of a type.  `!` after a field: it must be there.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from dist_lm.errors import ConfigError

Types = dict[str, dict[str, str]]
_SCHEMAS = Path(__file__).parent / "schemas"
_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    "string": {"str"},
    "integer": {"int"},
    "number": {"int", "float"},
    "boolean": {"bool"},
    "quantity": {"str", "int", "float"},
    "integer-or-string": {"str", "int"},
}


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake in one file."""

    line: int
    text: str
    do: str = ""

    def __str__(self) -> str:
        return f"{self.text}; {self.do}" if self.do else self.text


@cache
def load_types(*names: str) -> Types:
    """The tables `names` as one; a later one may use the types of an earlier one."""
    types: Types = {}
    for name in names:
        types |= json.loads((_SCHEMAS / f"{name}.json").read_text())["types"]
    return types


def read_documents(path: Path) -> list[yaml.Node]:
    """The documents of a YAML file.  Raises ConfigError where it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
        return [node for node in yaml.compose_all(text, yaml.SafeLoader) if node is not None]
    except OSError as error:
        raise ConfigError(f"cannot read {path}", why=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", why=str(error)) from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError("this is not YAML", where=f"{path}:{line}", why=error.problem or "") from None
    except yaml.YAMLError as error:
        raise ConfigError("this is not YAML", where=str(path), why=str(error).splitlines()[0]) from None


def line_of(node: yaml.Node) -> int:
    return node.start_mark.line + 1


def plain(node: yaml.Node) -> Any:
    """The bare value of a node."""
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_object(node, deep=True)
    finally:
        loader.dispose()


def items(node: yaml.Node | None) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
    """Key and value nodes of a mapping; nothing where it is none."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if isinstance(key, yaml.ScalarNode):
                yield key, value


def get(node: yaml.Node | None, *path: str | int) -> yaml.Node | None:
    """The node along keys and list positions, or None."""
    for part in path:
        if isinstance(part, int):
            inside = node.value if isinstance(node, yaml.SequenceNode) else []
            node = inside[part] if part < len(inside) else None
        else:
            node = next((value for key, value in items(node) if key.value == part), None)
    return node


def elements(node: yaml.Node | None) -> list[yaml.Node]:
    return node.value if isinstance(node, yaml.SequenceNode) else []


def text_of(node: yaml.Node | None) -> str:
    """The text of a scalar; empty where it is none."""
    return str(node.value) if isinstance(node, yaml.ScalarNode) else ""


def suggestion(word: str, known: Iterable[str]) -> str:
    """`did you mean x?`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else ""


def is_near(word: str, known: Iterable[str], cutoff: float = 0.85) -> bool:
    """Whether a free word is so near to a known one that it is a typo of it."""
    known = list(known)
    return word not in known and bool(difflib.get_close_matches(word, known, n=1, cutoff=cutoff))


def says(text: str, word: str) -> bool:
    """Whether `text` has `word` as a whole: not as the beginning of a longer name."""
    return re.search(re.escape(word) + r"(?![\w.-])", text) is not None


def unknown_key(key: yaml.ScalarNode, known: Iterable[str], inside: str) -> Problem:
    return Problem(line_of(key), f"`{key.value}` is not a key of {inside}", suggestion(key.value, known))


def check(node: yaml.Node, kind: str, types: Types, *, name: str = "", partial: bool = False) -> Iterator[Problem]:
    """What is wrong with `node` as a `kind`.  `partial`: fields may be missing (a patch)."""
    if kind == "any":
        yield from _twice(node)
    elif kind.startswith("["):
        yield from _check_list(node, kind[1:-1], types, name, partial)
    elif kind.startswith("{"):
        yield from _check_map(node, kind[1:-1], types, name, partial)
    elif kind.startswith("=|"):
        yield from _check_choice(node, kind[2:].split("|"), name)
    elif kind in _SCALARS:
        yield from _check_scalar(node, kind, name)
    elif kind == "string-or-Storage":
        yield from check(node, "string" if isinstance(node, yaml.ScalarNode) else "Storage", types, name=name)
    else:
        yield from _check_fields(node, kind, types, name, partial)


def _is_null(node: yaml.Node) -> bool:
    return node.tag == _TAG + "null"


def _check_fields(node: yaml.Node, kind: str, types: Types, name: str, partial: bool) -> Iterator[Problem]:
    if _is_null(node):
        return
    if not isinstance(node, yaml.MappingNode):
        yield Problem(line_of(node), f"{name or kind} must have keys of its own ({kind})")
        return
    yield from _twice(node)
    kinds = {field.rstrip("!"): inner for field, inner in types[kind].items()}
    given = set()
    for key, value in items(node):
        given.add(key.value)
        if key.value in kinds:
            yield from check(value, kinds[key.value], types, name=key.value, partial=partial)
        else:
            yield unknown_key(key, kinds, kind)
    for field in types[kind]:
        if field.endswith("!") and field[:-1] not in given and not partial:
            yield Problem(line_of(node), f"{kind} lacks `{field[:-1]}`")


def _check_list(node: yaml.Node, kind: str, types: Types, name: str, partial: bool) -> Iterator[Problem]:
    if _is_null(node):
        return
    if not isinstance(node, yaml.SequenceNode):
        yield Problem(line_of(node), f"`{name}` must be a list")
        return
    for element in node.value:
        yield from check(element, kind, types, name=name, partial=partial)


def _check_map(node: yaml.Node, kind: str, types: Types, name: str, partial: bool) -> Iterator[Problem]:
    if _is_null(node):
        return
    if not isinstance(node, yaml.MappingNode):
        yield Problem(line_of(node), f"`{name}` must be a set of keys and values")
        return
    yield from _twice(node)
    for key, value in items(node):
        yield from check(value, kind, types, name=f"{name}.{key.value}", partial=partial)


def _check_choice(node: yaml.Node, choices: list[str], name: str) -> Iterator[Problem]:
    if text_of(node) not in choices:
        shown = f"one of {', '.join(choices[:6])}" + (" ..." if len(choices) > 6 else "")
        do = suggestion(text_of(node), choices) or shown
        yield Problem(line_of(node), f"`{name}` cannot be `{text_of(node)}`", do)


def _check_scalar(node: yaml.Node, kind: str, name: str) -> Iterator[Problem]:
    if _is_null(node):
        return
    tag = node.tag.removeprefix(_TAG)
    if not isinstance(node, yaml.ScalarNode):
        yield Problem(line_of(node), f"`{name}` must be {kind}, not keys or a list")
    elif kind == "string" and tag == "timestamp":
        return
    elif tag not in _SCALARS[kind]:
        do = "put it in quotes" if kind == "string" else ""
        yield Problem(line_of(node), f"`{name}` must be {kind}, not {tag} `{node.value}`", do)


def _twice(node: yaml.Node) -> Iterator[Problem]:
    """Keys that are there twice: YAML readers keep one of them silently."""
    seen: set[str] = set()
    for key, _ in items(node):
        if key.value in seen:
            yield Problem(line_of(key), f"`{key.value}` is there twice", "keep one of them")
        seen.add(key.value)
