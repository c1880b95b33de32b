"""The verbs before a run: doctor.

Enters: a command line.  Leaves: an exit code.  Promises: heavy libraries are imported inside the verbs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dist_lm.errors import EXIT_DONE

ConfigOption = Annotated[Path | None, typer.Option("--config", "-c", help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as optim.lr=1e-4.")]


def add_verbs(app: typer.Typer) -> None:
    """Add these verbs to `dist-lm`."""
    app.command()(doctor)


def doctor(
    config: ConfigOption = None,
    overrides: Overrides = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="The Ray cluster and the job's package, too.")] = False,
    data: Annotated[bool, typer.Option("--data", help="Every byte of the data sets, too.")] = False,
    fix: Annotated[bool, typer.Option("--fix", help="Do the remedies by which nothing can be lost.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Is this machine able to run, and this configuration?  Each finding says what to do.

    dist-lm doctor

    dist-lm doctor -c my.yaml --data --fix

    dist-lm doctor -c my.yaml run.dir=/shared/runs/x --cluster --json
    """
    from dist_lm.worker import prepare_environment

    prepare_environment()
    from dist_lm.doctor.doctor import Wanted, examine, mend

    findings = []
    for finding in examine(Wanted(config, overrides or [], cluster, data)):
        findings.append(mend(finding) if fix else finding)
        if not as_json:
            print(findings[-1].line(), flush=True)
    failed = [finding for finding in findings if finding.level == "fail"]
    if as_json:
        print(json.dumps([finding.as_json() for finding in findings], indent=1))
    else:
        warned = sum(finding.level == "warn" for finding in findings)
        print(f"{len(findings)} findings, {warned} warnings, {len(failed)} failures")
    raise typer.Exit(failed[0].exit_code if failed else EXIT_DONE)
