"""The files that come with dist_lm: recipes, DeepSpeed settings, cluster files.

Enters: a name.  Leaves: a path.  Promises: they are there after `pip install`, without the repository;
in the repository, `files/` leads to its own folders.
"""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path

from dist_lm import disk
from dist_lm.errors import ConfigError

FILES = Path(__file__).parent / "files"
PREFIX = "recipe:"
"""`-c recipe:NAME` names a recipe that came with dist_lm."""
_TARGETS = {"recipes": Path("launch/recipes"), "ds_configs": Path("ds_configs"), "cluster": Path("cluster")}


def recipe_names() -> list[str]:
    return sorted(path.stem for path in (FILES / "recipes").glob("*.yaml"))


def recipe_path(name: str) -> Path:
    """Raises ConfigError where there is no such recipe."""
    names = recipe_names()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        do = f"did you mean {PREFIX}{close[0]}?" if close else f"There are {', '.join(names)}."
        raise ConfigError(f"there is no recipe `{name}`", where="--config", do=do)
    return FILES / "recipes" / f"{name}.yaml"


def first_line(name: str) -> str:
    """What a recipe is for: its first comment."""
    return recipe_path(name).read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def shipped_deepspeed(file: str) -> str:
    """The shipped file that `ds_configs/x.json` of a recipe means; any other path is itself."""
    path = Path(file)
    found = FILES / "ds_configs" / path.name
    return str(found) if path.parent == Path("ds_configs") and found.is_file() else file


def copy_files(to: Path) -> list[Path]:
    """Copy everything into a folder, as the repository has it; refuses to replace a file."""
    pairs = [
        (source, to / target / source.relative_to(FILES / kind))
        for kind, target in _TARGETS.items()
        for source in sorted((FILES / kind).rglob("*"))
        if source.is_file() and "__pycache__" not in source.parts
    ]
    for _, target in pairs:
        if target.exists():
            raise ConfigError(f"{target} is there already", do="Name a folder without these files.")
    with disk.disk_errors(to):
        for source, target in pairs:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    return [target for _, target in pairs]
