"""Configuration files: YAML and dotted overrides -> RunConfig, and where every value came from.

Enters: a YAML file, the files that it `extends`, overrides such as `optim.lr=1e-4`.
Leaves: LoadedConfig.  Promises: every mistake names its file and line, and all mistakes are named at
once.  Environment variables are not read.  `extends` is relative to the file that says it; every
other relative path stays relative to the working directory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from dist_lm.config import RunConfig, Section
from dist_lm.config_keys import flatten, public_fields, sections_in
from dist_lm.config_mistakes import raise_problems, translate, unknown_permissions, wrong_keys
from dist_lm.errors import ConfigError
from dist_lm.recipes.shipped import PREFIX, recipe_path, shipped_deepspeed
from dist_lm.yaml_tree import Entry, Tree, find, merge, parse_value, plain, read_tree

DEFAULT = "default"
_PATHS = ("model.from", "model.config", "data.train", "data.heldout", "data.tokenizer", "run.dir")
_STEERED = ("run.steps", "run.seed")
"""Keys of `run` that decide what is computed; the others decide what is reported, kept and survived."""
_SHARING = (
    *("batch.micro", "data.cache", "zero", "sequence_parallel_size", "deepspeed", "ray"),
    *("model.activation_checkpointing", "model.attention", "model.compile", "task.head_chunk", "task.packing"),
)
"""How the work is shared out; what is computed is the same for every value."""
_DAMAGE = ("data.on_damage", "data.max_quarantine")
"""What is done about damage; what was done stands in the checkpoints."""


@dataclass(frozen=True)
class LoadedConfig:
    """A configuration, and for every dotted key the place that its value came from."""

    config: RunConfig
    origins: dict[str, str]
    """`launch/recipes/x.yaml:8`, "override `optim.lr=1e-4`" or `default`."""


def load_config(path: Path, overrides: Sequence[str] = ()) -> LoadedConfig:
    """Read a YAML file; of overrides that name the same key, the last one counts.

    `recipe:NAME` is a recipe that came with dist_lm.  Raises ConfigError with all mistakes found.
    """
    if str(path).startswith(PREFIX):
        path = recipe_path(str(path).removeprefix(PREFIX))
        tree = _with_bases(path, ())
        if "deepspeed" in tree:
            # A recipe's paths count from the repository, which an installed dist_lm does not have.
            file = tree["deepspeed"]
            tree["deepspeed"] = Entry(shipped_deepspeed(str(file.value)), file.place)
    else:
        tree = _with_bases(path, ())
    for text in overrides:
        tree = merge(tree, _override(text))
    tree = _open_sections(tree, RunConfig)
    problems = list(wrong_keys(tree))
    config: RunConfig | None = None
    try:
        config = RunConfig.model_validate(plain(tree))
        problems += unknown_permissions(config, tree)
    except ValidationError as error:
        problems += translate(error, tree, str(path), {problem.key for problem in problems})
    raise_problems(problems, str(path), do="`dist-lm config schema` tells every key, its type and its default.")
    assert config is not None, "a configuration that failed has problems"
    return LoadedConfig(config, {key: _origin(tree, key) for key in flatten(config)})


def identity(config: RunConfig) -> dict[str, Any]:
    """Flat dotted keys, as JSON values, that decide what the run computes.

    Paths are no part of it: the trainer adds the fingerprints of what they lead to.
    """
    left_out = (*_PATHS, *_SHARING, *_DAMAGE)
    return {
        key: _json(value)
        for key, value in flatten(config).items()
        if not any(f"{key}.".startswith(f"{name}.") for name in left_out)
        and (key in _STEERED or not key.startswith("run."))
    }


def identity_diff(old: Mapping[str, Any], new: Mapping[str, Any], allow: Sequence[str] = ()) -> list[str]:
    """What changed between two identities, a line each, but for keys and sections in `allow`."""
    lines = []
    for key in dict.fromkeys([*old, *new]):
        allowed = any(key == entry or key.startswith(f"{entry}.") for entry in allow)
        before, after = (json.dumps(side[key]) if key in side else "absent" for side in (old, new))
        same = key in old and key in new and old[key] == new[key]
        if not same and not allowed:
            lines.append(f"{key}: {before} -> {after}")
    return lines


def show(loaded: LoadedConfig) -> str:
    """A table of key, value and origin, a line each."""
    rows = [(key, _text(value), loaded.origins.get(key, DEFAULT)) for key, value in flatten(loaded.config).items()]
    key_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{key:<{key_width}}  {value:<{value_width}}  {origin}" for key, value, origin in rows)


def schema() -> dict[str, Any]:
    """JSON schema of the YAML files, for editors."""
    return RunConfig.model_json_schema(by_alias=True)


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(_json(value))


def _json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_json(item) for item in value]
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    return str(value) if isinstance(value, Path) else value


def _with_bases(path: Path, chain: tuple[Path, ...], said_at: str = "") -> Tree:
    """The file's tree over that of the file it extends."""
    resolved = path.resolve()
    if resolved in chain:
        names = " -> ".join(file.name for file in [*chain[chain.index(resolved) :], resolved])
        raise ConfigError("files extend each other in a circle", where=said_at, why=names)
    tree = read_tree(path, said_at=said_at)
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base.value, str) or not base.value:
        raise ConfigError("`extends` names one file", where=base.place, do="Write `extends: other.yaml`.")
    base_path = Path(os.path.normpath(path.parent / base.value))
    return merge(_with_bases(base_path, (*chain, resolved), base.place), tree)


def _override(text: str) -> Tree:
    key, equals, value = text.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        do = "Write key=value with a dotted key, such as optim.lr=1e-4."
        raise ConfigError(f"`{text}` is not an override", do=do)
    # The rest of a URL may be a secret.
    place = f"override `{text}`" if "://" not in value else f"override `{key}={value.partition('://')[0]}://...`"
    entry = parse_value(value, place)
    for part in reversed(parts[1:]):
        entry = Entry({part: entry}, place)
    return {parts[0]: entry}


def _open_sections(tree: Tree, section: type[Section]) -> Tree:
    """A section heading with nothing below it is null to YAML and an empty section to a person."""
    opened = dict(tree)
    for name, info in public_fields(section).items():
        inner = sections_in(info.annotation)
        if inner and name in tree:
            value = {} if tree[name].value is None else tree[name].value
            if isinstance(value, dict):
                # Variants of a section have no sections inside them.
                value = _open_sections(value, inner[0]) if len(inner) == 1 else value
            opened[name] = Entry(value, tree[name].place)
    return opened


def _origin(tree: Tree, key: str) -> str:
    path = key.split(".")
    entries = list(find(tree, path))
    # A section may be written as one value: `ray.workers: 8`.
    whole = bool(entries) and not isinstance(entries[-1].value, dict)
    return entries[-1].place if len(entries) == len(path) or whole else DEFAULT
