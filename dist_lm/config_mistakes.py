"""Mistakes in a configuration, in a person's words: what, where, what to do.

Enters: a tree of entries, Pydantic's errors.  Leaves: problems, and one ConfigError for all of them.
Promises: every problem names file and line, or the override, that caused it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from dist_lm.config import RunConfig, Section
from dist_lm.config_keys import fields_by_key, public_fields, sections_in, suggestion, task_names, variant
from dist_lm.errors import MAX_MESSAGE_LINES, ConfigError
from dist_lm.yaml_tree import Entry, Tree, find

_LONGEST_VALUE = 60


@dataclass(frozen=True)
class Problem:
    """One mistake."""

    what: str
    where: str = ""
    why: str = ""
    do: str = ""
    key: str = ""
    """Dotted key that it is about, so that nobody reports it again."""

    def line(self) -> str:
        """The problem among others: shorter, without the second line of advice."""
        why = "; ".join(" ".join(part.split()) for part in self.why.splitlines())
        facts = "; ".join(part for part in (self.what, why, *self.do.splitlines()[:1]) if part)
        return f"{self.where}  {facts}" if self.where else facts


def raise_problems(problems: Sequence[Problem], subject: str, *, do: str) -> None:
    """Raise one ConfigError with all problems, a line each if there are several; none: return."""
    unique = list(dict.fromkeys(problems))
    if not unique:
        return
    if len(unique) == 1:
        problem = unique[0]
        raise ConfigError(problem.what, where=problem.where, why=problem.why, do=problem.do)
    room = MAX_MESSAGE_LINES - 2
    lines = [problem.line() for problem in unique]
    if len(lines) > room:
        lines = [*lines[: room - 1], f"... and {len(lines) - room + 1} more"]
    raise ConfigError(f"{len(unique)} mistakes", where=subject, why="\n".join(lines), do=do)


def wrong_keys(tree: Tree, section: type[Section] = RunConfig, path: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Keys that do not exist, and values that Pydantic or the file system would quietly misread."""
    fields = public_fields(section)
    for name, entry in tree.items():
        key = ".".join((*path, name))
        if name not in fields:
            yield Problem(f"unknown key `{key}`", entry.place, do=suggestion(key, list(fields)), key=key)
            continue
        inner = sections_in(fields[name].annotation)
        if not inner:
            yield from _misread(key, entry, fields[name].annotation)
        elif isinstance(entry.value, dict):
            chosen = variant(inner, entry.value["name"].value if "name" in entry.value else None)
            if chosen:
                yield from wrong_keys(entry.value, chosen, (*path, name))


def _misread(key: str, entry: Entry, annotation: Any) -> Iterator[Problem]:
    kinds = set(_kinds(annotation))
    if Any in kinds or get_origin(annotation) is dict:
        return
    what = do = ""
    items = entry.value if isinstance(entry.value, list) else [entry.value]
    if isinstance(entry.value, dict) and dict not in kinds:
        what = f"`{key}` is one value, not a section"
    elif bool not in kinds and any(isinstance(item, bool) for item in items):
        what, do = f"`{key}` should not be true or false", "YAML reads yes, no, on and off as true and false."
    elif isinstance(entry.value, str) and not entry.value.strip():
        what = f"`{key}` is empty"
    elif Path in kinds and isinstance(entry.value, str) and entry.value.startswith("~"):
        what, do = f"`{key}` begins with `~`, which is not expanded", "Write the whole path."
    if what:
        yield Problem(what, entry.place, do=do, key=key)


def _kinds(annotation: Any) -> Iterator[Any]:
    """The plain types inside an annotation: `Path | None` has Path and NoneType."""
    inner = get_args(annotation)
    if get_origin(annotation) is dict:
        yield dict
    if not inner:
        yield annotation if isinstance(annotation, type) or annotation is Any else type(annotation)
    for part in inner:
        yield from _kinds(part)


def unknown_permissions(config: RunConfig, tree: Tree) -> Iterator[Problem]:
    """Entries of `run.allow_change` that name no key, section or part of a key."""
    known = list(fields_by_key())
    for allowed in config.run.allow_change:
        if not any(f"{key}.".startswith(f"{allowed}.") or allowed.startswith(f"{key}.") for key in known):
            place = place_of(tree, ["run", "allow_change"], "")
            section = allowed.rpartition(".")[0]
            siblings = [key.rpartition(".")[2] for key in known if key.rpartition(".")[0] == section]
            yield Problem(
                f"`run.allow_change` names the unknown key `{allowed}`",
                place,
                do=suggestion(allowed, siblings),
            )


def place_of(tree: Tree, path: Sequence[str], file: str) -> str:
    """Where `path` is said, or the nearest section around it; else the file."""
    *_, entry = [Entry(None, file), *find(tree, path)]
    return entry.place


def translate(error: ValidationError, tree: Tree, file: str, reported: set[str]) -> Iterator[Problem]:
    """Pydantic's errors in words, but for keys that are reported already."""
    for detail in error.errors(include_url=False):
        location = list(detail["loc"])
        if location[:1] == ["task"]:
            del location[1:2]  # Pydantic puts the variant's name between `task` and the key.
        indices = [part for part in location if isinstance(part, int)]
        path = [str(part) for part in location if not isinstance(part, int)]
        key = ".".join(path)
        if detail["type"] == "rules":
            for words, keys in detail["ctx"]["rules"]:
                yield _rule(words, keys, tree)
        elif detail["type"] != "extra_forbidden" and key not in reported:
            yield _in_words(detail, key, path, indices, place_of(tree, path, file))


def _rule(words: str, keys: Sequence[str], tree: Tree) -> Problem:
    places = []
    for key in keys:
        path = key.split(".")
        entries = list(find(tree, path))
        if len(entries) == len(path):
            places.append(entries[-1].place)
    return Problem(words, ", ".join(dict.fromkeys(places)))


def _in_words(detail: Any, key: str, path: list[str], indices: list[int], place: str) -> Problem:
    kind, value = detail["type"], detail["input"]
    if kind == "missing" and not indices:
        return Problem(f"`{key}` is missing", place, do=_about(key))
    if kind == "missing":
        return Problem(f"`{key}` has too few values", place)
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        return _no_such_task(detail.get("ctx", {}).get("tag"), place)
    if kind in ("model_type", "model_attributes_type"):
        return Problem(f"`{key}` should be a section of `key: value` lines", place)
    message = "should be a path" if kind == "path_type" else detail["msg"].removeprefix("Input ")
    shown = repr(value)
    if len(shown) > _LONGEST_VALUE:
        shown = shown[:_LONGEST_VALUE] + "..."
    message = message.replace("valid tuple", "list")
    return Problem(f"`{key}` {message[0].lower()}{message[1:]}, got {shown}", place)


def _no_such_task(written: str | None, place: str) -> Problem:
    names = task_names()
    valid = f"one of: {' '.join(names)}"
    if written in (None, "None"):
        return Problem("`task.name` is missing", place, do=valid)
    close = difflib.get_close_matches(str(written).lower().replace("-", "_"), names, n=1, cutoff=0.5)
    hint = f"did you mean `{close[0]}`?\n" if close else ""
    return Problem(f"there is no task `{written}`", place, do=hint + valid)


def _about(key: str) -> str:
    """What a missing key is for; of a section, the keys that it needs."""
    fields = fields_by_key()
    if key in fields:
        return fields[key].description or ""
    needed = [name for name, info in fields.items() if name.startswith(f"{key}.") and info.is_required()]
    return f"it needs {', '.join(needed)}" if needed else ""
