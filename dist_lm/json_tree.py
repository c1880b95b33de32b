"""A JSON file as a tree in which every value knows its line.

Enters: a JSON file.  Leaves: the same nested entries that yaml_tree makes.
Promises: duplicate keys, comments and trailing commas are refused with file and line.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from dist_lm.errors import ConfigError
from dist_lm.yaml_tree import Entry, Tree

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]')
_IN_LIST = ""
"""Stands for the unnamed step from a list to its items."""


def read_json_tree(path: Path, *, said_at: str = "") -> Tree:
    """The file's keys.  `said_at` is the place that named the file, for the message if it is missing."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        do = "Paths count from the working directory."
        raise ConfigError(f"there is no file {path}", where=said_at, do=do) from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}", where=said_at, why=error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", where=said_at, why=str(error)) from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        do = "JSON has no comments and no comma after the last item."
        raise ConfigError("this is not JSON", where=f"{path}:{error.lineno}", why=error.msg, do=do) from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is not a JSON object", do='Write { "key": value, ... }.')
    return _tree(values, _key_lines(text, path), str(path), ())


def _key_lines(text: str, path: Path) -> dict[tuple[str, ...], int]:
    """The line of every key in valid JSON."""
    lines: dict[tuple[str, ...], int] = {}
    around: list[str] = []
    key = _IN_LIST
    string = (0, "")
    for match in _TOKEN.finditer(text):
        token = match.group()
        if token in "{[":
            around.append(key)
            key = _IN_LIST
        elif token in "}]":
            key = around.pop()
        elif token == ":":
            key = json.loads(string[1])
            full = (*around[1:], key)
            line = text.count("\n", 0, string[0]) + 1
            if full in lines and _IN_LIST not in full:
                why = f"The first is at {path}:{lines[full]}."
                raise ConfigError(f"`{'.'.join(full)}` is there twice", where=f"{path}:{line}", why=why)
            lines[full] = line
        else:
            string = (match.start(), token)
    return lines


def _tree(values: dict[str, Any], lines: dict[tuple[str, ...], int], file: str, path: tuple[str, ...]) -> Tree:
    tree: Tree = {}
    for key, value in values.items():
        full = (*path, key)
        inner = _tree(value, lines, file, full) if isinstance(value, dict) else value
        tree[key] = Entry(inner, f"{file}:{lines[full]}")
    return tree
