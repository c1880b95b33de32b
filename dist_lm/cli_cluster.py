"""Verbs about clusters: `dist-lm cluster`.

Enters: a command line.  Leaves: an exit code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_lm.errors import ConfigError

cluster_app = typer.Typer(help="Cluster files: check them before a cluster is paid for.", no_args_is_help=True)


@cluster_app.callback()
def _group() -> None:
    """Keeps `check` a word of its own."""


@cluster_app.command("check")
def cluster_check(
    files: Annotated[list[Path], typer.Argument(help="YAML of `ray up`, KubeRay, Kustomize or SkyPilot.")],
) -> None:
    """Say what is wrong with cluster files, with lines and suggestions; needs no network.

    dist-lm cluster check cluster/aws.yaml

    dist-lm cluster check cluster/kuberay/*.yaml
    """
    from dist_lm.cluster.manifests import check_file

    wrong = 0
    for file in files:
        problems = check_file(file)
        wrong += len(problems)
        for problem in problems:
            print(f"{file}:{problem.line}: {problem}")
        if not problems:
            print(f"ok: {file}")
    if wrong:
        raise ConfigError(f"{wrong} problem{'s' if wrong > 1 else ''} in cluster files", do="They are listed above.")
