"""The working directory that goes with a job: what of it is sent, and whether the cluster takes it.

Enters: a folder.  Leaves: its size by entry; or an error.
Promises: what Ray would send is what is counted: .gitignore and .rayignore are read by Ray's own code.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from dist_lm.errors import EnvironmentFault

EXCLUDES = (".git", ".venv", "__pycache__")
"""Never sent.  Ray itself sends .git."""
LIMIT_BYTES = 100 * 2**20
"""What the head's dashboard takes in one request (DASHBOARD_CLIENT_MAX_SIZE of Ray)."""
_SHOWN = 4


def check_package(folder: Path) -> int:
    """Bytes that Ray sends of `folder`; its package is not compressed.

    Raises EnvironmentFault with the largest entries where it is more than the cluster takes.
    """
    by_entry = entry_sizes(folder)
    total = sum(by_entry.values())
    if total <= LIMIT_BYTES:
        return total
    largest = sorted(by_entry.items(), key=lambda item: -item[1])[:_SHOWN]
    raise EnvironmentFault(
        f"the working directory makes a package of {_mib(total)}, the cluster takes {_mib(LIMIT_BYTES)}",
        where=str(folder),
        why="\n".join(f"{_mib(size):>10}  {name}" for name, size in largest),
        do="Name what the job does not need in .rayignore; data and runs belong on shared storage.",
    )


def entry_sizes(folder: Path) -> dict[str, int]:
    """Bytes that are sent of each entry of the folder."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[str, int] = {}

    def count(path: Path) -> None:
        if path.is_file():
            entry = path.relative_to(folder).parts[0]
            sizes[entry] = sizes.get(entry, 0) + path.stat().st_size

    excludes = [_get_excludes(folder, list(EXCLUDES))]
    gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    _dir_travel(folder, excludes, count, include_gitignore=gitignore, logger=logging.Logger("quiet"))
    return sizes


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
