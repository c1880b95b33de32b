"""The verbs before a run: doctor, recipes, init.

Enters: a command line.  Leaves: an exit code.  Promises: heavy libraries are imported inside the verbs.
"""

from __future__ import annotations

import contextlib
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
    app.command()(recipes)
    app.command()(init)


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

    # It imports torch at its end; where that fails, a finding tells it.
    with contextlib.suppress(Exception):
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


def recipes(
    copy: Annotated[Path | None, typer.Option("--copy", help="Copy them, ds_configs/ and cluster/ there.")] = None,
) -> None:
    """The recipes that came with dist_lm; `-c recipe:NAME` takes one, wherever you are.

    dist-lm recipes

    dist-lm train -c recipe:bert-mini-docs --cpu 2

    dist-lm recipes --copy my-project
    """
    from dist_lm.recipes.shipped import copy_files, first_line, recipe_names

    if copy is not None:
        print(f"{copy}: {len(copy_files(copy))} files in launch/recipes, ds_configs and cluster")
        return
    for name in recipe_names():
        print(f"recipe:{name:<18} {first_line(name)}")


def init(
    out: Annotated[Path, typer.Argument(help="New YAML file.")],
    task: Annotated[str, typer.Option(prompt="Task (mlm, causal_lm, classification, ...)", help="task.name")],
    data: Annotated[str, typer.Option(prompt="Folder of the prepared data", help="With train/ and heldout/.")],
    tokenizer: Annotated[str, typer.Option(prompt="Tokenizer folder", help="That of the data.")],
    run_dir: Annotated[str, typer.Option(prompt="Run folder", help="Checkpoints, metrics, logs.")],
    steps: Annotated[int, typer.Option(prompt="Steps", help="Optimizer updates.")],
    start_from: Annotated[str, typer.Option("--from", help="Hugging Face folder or run to start from.")] = "",
) -> None:
    """Write a recipe of your own; what no flag says is asked.

    dist-lm init my.yaml

    dist-lm init my.yaml --task mlm --data data --tokenizer tokenizer --run-dir runs/mine --steps 1000

    dist-lm init my.yaml --task classification --data data --tokenizer bert --run-dir runs/x --steps 500 --from bert
    """
    from dist_lm import disk
    from dist_lm.errors import ConfigError
    from dist_lm.recipes.new import Answers, new_recipe

    if out.exists():
        raise ConfigError(f"{out} is there already", do="Name a new file.")
    text = new_recipe(Answers(task, data, tokenizer, run_dir, steps, start_from))
    with disk.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    disk.write_bytes(out, text.encode())
    print(f"{out}; next: dist-lm doctor -c {out}")
