"""What a Ray cluster needs: a token, a package that is small enough, nodes that are alike.

Enters: the run folder and the working directory.  Leaves: findings.
Promises: nothing is started on the cluster but a task a node that looks at the run folder.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path

from dist_lm.cluster import ray_cluster
from dist_lm.cluster.job_package import LIMIT_BYTES, check_package
from dist_lm.doctor.finding import Finding, fail, of_error, ok, warn
from dist_lm.doctor.storage import MOST_SKEW_S
from dist_lm.errors import DistLMError


def check_token(environment: Mapping[str, str] = os.environ, home: Path | None = None) -> Iterator[Finding]:
    """Whoever reaches the ports of a Ray head without a token runs code on every node."""
    if environment.get("RAY_AUTH_MODE") != "token":
        do = "ray get-auth-token --generate; export RAY_AUTH_MODE=token here and on every node (docs/cluster.md)."
        yield warn("ray token", "RAY_AUTH_MODE is not token: whoever reaches the head runs code on it", do)
        return
    if environment.get("RAY_AUTH_TOKEN"):
        yield ok("ray token", "RAY_AUTH_TOKEN is set")
        return
    path = Path(environment.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray" / "auth_token")
    if not path.is_file():
        do = "ray get-auth-token --generate, and copy the file to every node."
        yield fail("ray token", f"RAY_AUTH_MODE is token, and there is no {path}", do)
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        do = f"chmod 600 {path}"
        yield fail("ray token", f"others may read {path} (mode {mode:04o})", do, lambda: path.chmod(0o600))
    else:
        yield ok("ray token", f"{path}, for nobody else to read")


def check_job_package(folder: Path) -> Iterator[Finding]:
    try:
        size = check_package(folder)
    except DistLMError as error:
        yield of_error("job package", error)
    else:
        yield ok("job package", f"{size / 2**20:.1f} of {LIMIT_BYTES / 2**20:.0f} MiB")


def check_cluster(run_dir: Path | None) -> Iterator[Finding]:
    """The cluster answers; its nodes have this machine's versions and reach the run folder."""
    is_new = run_dir is not None and not run_dir.exists()
    try:
        ray_cluster.connect()
        nodes = ray_cluster.living_nodes()
        if run_dir is None:
            yield ok("cluster", f"{len(nodes)} nodes live")
            return
        answers = ray_cluster.check_nodes(run_dir, nodes)
    except DistLMError as error:
        yield of_error("cluster", error)
        return
    finally:
        if run_dir is not None:
            _remove_empty([run_dir / "logs" / "ray", run_dir / "logs", *([run_dir] if is_new else [])])
    yield ok("cluster", f"{len(nodes)} nodes with the same versions reach {run_dir}")
    for name, facts in answers.items():
        if abs(facts["skew_s"]) > MOST_SKEW_S:
            do = "Run chrony or another NTP client on every node and on the file server."
            yield warn("clock", f"{name} is {facts['skew_s']:+.1f} s away from the storage of the run folder", do)


def _remove_empty(folders: list[Path]) -> None:
    """The folders that the nodes met in, unless a run has put something there."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()
