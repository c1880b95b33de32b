"""What may stand in a DeepSpeed JSON of dist_lm, and what may not.

Enters: the tree of a JSON file.  Leaves: problems with file and line.
Promises: an unknown key, a key of somebody else and an "auto" without a meaning are all refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any

from dist_lm import deepspeed_keys as keys
from dist_lm.config_mistakes import Problem
from dist_lm.deepspeed_keys import KeyPath
from dist_lm.yaml_tree import Entry, Tree

AUTO = "auto"
NVME_PLACEHOLDER = "SET_ME"
_CUTOFF = 0.75
_KNOWN = keys.DEEPSPEED_OWNED | {path[0] for path in keys.OWNED_BY_YAML} | {keys.DERIVED[0]}
_AUTO_ALLOWED = {
    *keys.OWNED_BY_YAML,
    keys.DERIVED,
    *keys.FORMULAS,
    *keys.AUTO_IN_DEEPSPEED,
    *keys.AUTO_IS_ABSENT,
    *keys.REFUSED_IF_ON,
    *keys.REFUSED_IF_OFF,
}


def walk(tree: Tree, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Entry]]:
    """Every key with its path, sections before what they hold."""
    for name, entry in tree.items():
        yield (*path, name), entry
        if isinstance(entry.value, dict):
            yield from walk(entry.value, (*path, name))


def foreign_keys(tree: Tree) -> Iterator[Problem]:
    """Keys that DeepSpeed does not know, and keys that a dist_lm run must not set."""
    for name, entry in tree.items():
        if name in keys.REFUSED:
            yield Problem(
                f"`{name}` does not belong in a DeepSpeed file of dist_lm",
                entry.place,
                f"{keys.REFUSED[name]}.",
                "Remove it.",
            )
        elif name not in _KNOWN:
            yield _unknown(name, entry, sorted(_KNOWN))
    for path, entry in walk(tree):
        name = ".".join(path)
        known = keys.UNCHECKED.get(path[:-1])
        if known is not None and path[-1] not in known:
            yield _unknown(name, entry, sorted(known))
        if path in keys.OBJECTS and not isinstance(entry.value, dict):
            yield Problem(f"`{name}` should be an object", entry.place, do="Write { ... }.")
        if path in keys.REFUSED_IF_ON and entry.value not in (False, None, AUTO):
            yield Problem(f"`{name}` must be off", entry.place, f"{keys.REFUSED_IF_ON[path]}.", "Remove it.")
        if path in keys.REFUSED_IF_OFF and entry.value is False:
            yield Problem(f"`{name}` must be on", entry.place, f"{keys.REFUSED_IF_OFF[path]}.", "Remove it.")


def stray_autos(tree: Tree) -> Iterator[Problem]:
    """An "auto" where neither DeepSpeed nor dist_lm has a value for it."""
    for path, entry in walk(tree):
        if entry.value == AUTO and path not in _AUTO_ALLOWED:
            yield Problem(
                f'"auto" has no meaning in `{".".join(path)}`',
                entry.place,
                "DeepSpeed would take it for its default without a word.",
                "Write a value, or remove the key.",
            )


def offload_problems(tree: Tree, stage: int, optimizer: str) -> Iterator[Problem]:
    """Offload that the stage or the optimizer cannot do, or whose disk is not named."""
    for name, for_cpu in (("offload_optimizer", 1), ("offload_param", 3)):
        entry = _at(tree, ("zero_optimization", name))
        if entry is None or not isinstance(entry.value, dict):
            continue
        device = entry.value["device"].value if "device" in entry.value else "none"
        # Below stage 3 DeepSpeed takes nvme for cpu.
        lowest = 3 if device == "nvme" else for_cpu
        if device not in ("none", None) and stage < lowest:
            yield Problem(
                f"`{name}` to {device} needs ZeRO stage {lowest} or more, the stage is {stage}",
                entry.place,
                do=f"Set `zero: {lowest}`, or remove `{name}`.",
            )
        if device not in ("none", None) and name == "offload_optimizer" and optimizer != "adamw":
            yield Problem(
                f"the state of {optimizer} cannot be offloaded",
                entry.place,
                do=f"Set optim.name to adamw, or remove `{name}`.",
            )
        path = entry.value["nvme_path"].value if "nvme_path" in entry.value else None
        if device == "nvme" and path in (None, "", NVME_PLACEHOLDER):
            place = entry.value["nvme_path"].place if path is not None else entry.place
            yield Problem(
                f"`{name}.nvme_path` names no folder",
                place,
                "Only you know where a fast local disk is mounted.",
                "Copy the file, write the folder there, and name the copy in `deepspeed`.",
            )


def value_at(tree: Tree, path: KeyPath) -> Any:
    """The value at `path`; None where the file says nothing or "auto"."""
    entry = _at(tree, path)
    return None if entry is None or entry.value == AUTO else entry.value


def same(left: Any, right: Any) -> bool:
    """Equal as settings: 8 and "8" and 8.0 are, lists and tuples are."""
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    try:
        return float(left) == float(right)
    except (TypeError, ValueError):
        return bool(left == right)


def nested(dotted: str, entry: Entry) -> Tree:
    """The tree that holds only this key."""
    first, _, rest = dotted.partition(".")
    return {first: Entry(nested(rest, entry), entry.place) if rest else entry}


def as_tree(values: dict[str, Any]) -> Tree:
    """Plain nested values as a tree without places."""
    return {name: Entry(as_tree(value) if isinstance(value, dict) else value, "") for name, value in values.items()}


def auto_paths(values: dict[str, Any], path: KeyPath = ()) -> Iterator[KeyPath]:
    """Where a plain dict still says "auto"."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from auto_paths(value, (*path, name))
        elif value == AUTO:
            yield (*path, name)


def _at(tree: Tree, path: KeyPath) -> Entry | None:
    return next((entry for found, entry in walk(tree) if found == path), None)


def _unknown(name: str, entry: Entry, known: list[str]) -> Problem:
    close = difflib.get_close_matches(name.split(".")[-1], known, n=1, cutoff=_CUTOFF)
    hint = f"did you mean `{close[0]}`?" if close else f"known: {' '.join(known)}"
    return Problem(f"unknown DeepSpeed key `{name}`", entry.place, "DeepSpeed would ignore it.", hint)
