"""The verbs about runs: status, logs, stop, tb, report, checkpoints.

Enters: a command line.  Leaves: an exit code.  Promises: a run that is under way is not disturbed,
but for `stop`, which asks it to save and end.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_lm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dist_lm.checkpoint.store import Store
    from dist_lm.run_dir import RunDir

checkpoints_app = typer.Typer(
    help="List, verify, prune and copy checkpoints.\n\n"
    "dist-lm checkpoints list runs/demo\n\n"
    "dist-lm checkpoints verify runs/demo\n\n"
    "dist-lm checkpoints copy runs/demo@1000 s3://bucket/backup",
    no_args_is_help=True,
)
RunFolder = Annotated[Path, typer.Argument(help="Run folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="For programs.")]


def add_verbs(app: typer.Typer) -> None:
    """Add these verbs to `dist-lm`."""
    app.command()(status)
    app.command()(logs)
    app.command()(stop)
    app.command()(tb)
    app.command()(report)
    app.add_typer(checkpoints_app, name="checkpoints")


def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Attempts, faults, lost steps, goodput, and whether the last checkpoint verifies.

    dist-lm status runs/demo

    dist-lm status runs/demo --json

    watch -n 10 dist-lm status /shared/runs/x
    """
    from dist_lm.run_dir import RunDir
    from dist_lm.status import status_of

    found = status_of(RunDir(run))
    print(json.dumps(found.as_json(), indent=1) if as_json else "\n".join(found.lines()))


def logs(
    run: RunFolder,
    rank: Annotated[int, typer.Option(help="Whose.", min=0)] = 0,
    lines: Annotated[int, typer.Option(help="The last so many; 0: all.", min=0)] = 50,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until nobody trains the run.")] = False,
) -> None:
    """What a rank of a run said, over all attempts; then where its tracebacks are.

    dist-lm logs runs/demo

    dist-lm logs runs/demo --rank 1 --lines 0

    dist-lm logs /shared/runs/x --follow
    """
    from dist_lm.run_dir import RunDir
    from dist_lm.run_log import log_file, tail
    from dist_lm.status import is_running

    run_dir = RunDir(run)
    path = log_file(run_dir.logs, rank)
    if not path.is_file():
        do = f"Ranks that have left one: {', '.join(sorted(found.stem for found in run_dir.logs.glob('*.log')))}."
        raise ConfigError(f"{run} has no log of rank {rank}", where=str(path), do=do)
    for line in tail(path, lines, until=(lambda: not is_running(run_dir)) if follow else None):
        print(line, flush=True)
    for told in sorted(run_dir.errors.glob(f"*-rank-{rank:05d}.txt")):
        print(f"{told}: {told.read_text().partition(chr(10))[0]}")


def stop(run: RunFolder) -> None:
    """Ask a run to save a checkpoint and to end with exit code 75.  The same command goes on.

    dist-lm stop runs/demo

    dist-lm stop /shared/runs/x

    dist-lm stop runs/demo && dist-lm status runs/demo
    """
    from dist_lm.run_dir import RunDir
    from dist_lm.status import is_running

    run_dir = RunDir(run)
    if not is_running(run_dir):
        raise ConfigError(f"nobody trains {run}", why="No living process holds the run's lease.")
    run_dir.stop_file.touch()
    print(f"asked: {run} saves after its current step and ends with exit code 75")


def tb(
    run: RunFolder,
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 6006,
) -> None:
    """Show a run in TensorBoard.

    dist-lm tb runs/demo

    dist-lm tb /shared/runs/x

    dist-lm tb runs/demo --port 6007
    """
    from dist_lm.run_dir import RunDir

    folder = RunDir(run).tensorboard
    if not folder.is_dir():
        raise ConfigError(f"{run} holds no TensorBoard files", do="Name a folder that `dist-lm train` wrote.")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    os.execv(sys.executable, command)


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared.")],
    out: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    evaluation: Annotated[list[Path] | None, typer.Option(help="File of `dist-lm eval --out`.  Repeatable.")] = None,
    plan: Annotated[bool, typer.Option(help="Plan the memory of each run; it takes some seconds.")] = True,
) -> None:
    """One HTML page of a run, or of several side by side; it needs no network.

    dist-lm report runs/demo

    dist-lm report runs/* --out all.html

    dist-lm report runs/ner --evaluation test-figures.json --out ner.html
    """
    from dist_lm import disk
    from dist_lm.report.evaluations import read_evaluation
    from dist_lm.report.page import page
    from dist_lm.report.planned import planned_memory
    from dist_lm.report.run_facts import read_run
    from dist_lm.run_dir import RunDir

    judged = [read_evaluation(path) for path in evaluation or []]
    facts = [read_run(RunDir(run)) for run in runs]
    if plan:
        facts = [replace(one, planned=planned_memory(RunDir(run))) for one, run in zip(facts, runs, strict=True)]
    text = page(facts, judged)
    disk.write_bytes(out, text.encode())
    print(f"{out}: {len(runs)} run{'s' if len(runs) > 1 else ''}, {len(text) / 1e3:.0f} kB")


def _run_and_store(run: Path) -> tuple[RunDir, Store]:
    from dist_lm.checkpoint.store import open_store
    from dist_lm.run_dir import RunDir

    run_dir = RunDir(run)
    if not run_dir.identity.exists():
        raise ConfigError(f"{run} is not a run folder", do="Name a folder that `dist-lm train` wrote.")
    return run_dir, open_store(run_dir.checkpoint_location())


@checkpoints_app.command("list")
def checkpoints_list(run: RunFolder, as_json: AsJson = False) -> None:
    """Every published checkpoint, newest first.

    dist-lm checkpoints list runs/demo

    dist-lm checkpoints list runs/demo --json

    dist-lm checkpoints list /shared/runs/x
    """
    from dist_lm.checkpoint import commit
    from dist_lm.checkpoint.manifest import Checkpoint

    _, store = _run_and_store(run)
    marked = commit.best(store) or {}
    rows: list[dict[str, Any]] = []
    for name in store.names():
        checkpoint = Checkpoint.read(store, name)
        progress = checkpoint.progress
        rows.append(
            {
                "step": progress.step,
                "bytes": checkpoint.num_bytes,
                "world_size": progress.world_size,
                "zero_stage": progress.zero_stage,
                "precision": progress.precision,
                "tokens": progress.tokens,
                "best": marked.get("step") == progress.step,
            }
        )
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(
            f"step {row['step']:>8}  {row['bytes'] / 1e6:9.1f} MB  {row['world_size']} ranks  ZeRO-{row['zero_stage']} "
            f"{row['precision']}  {row['tokens']:,} tokens{'  best' if row['best'] else ''}"
        )


@checkpoints_app.command("verify")
def checkpoints_verify(run: RunFolder) -> None:
    """Compare every byte of every checkpoint with its manifest; changes nothing.

    dist-lm checkpoints verify runs/demo

    dist-lm checkpoints verify /shared/runs/x

    dist-lm checkpoints verify runs/demo && dist-lm export runs/demo --out model
    """
    from dist_lm.checkpoint.manifest import Checkpoint

    run_dir, store = _run_and_store(run)
    bad = 0
    for name in store.names():
        try:
            checkpoint = Checkpoint.read(store, name)
            problem = checkpoint.damage(sorted(checkpoint.files))
            if not problem and checkpoint.run_id != run_dir.run_id():
                problem = "it is of another run"
        except DataError as error:
            problem = f"{error.what}: {error.why}"
        bad += bool(problem)
        print(f"{name}  {problem or 'ok'}")
    if bad:
        raise DataError(f"{bad} checkpoints are damaged", where=store.location, do="A resume sets them aside.")


@checkpoints_app.command("prune")
def checkpoints_prune(
    run: RunFolder,
    keep: Annotated[int, typer.Option(min=1, help="Newest checkpoints that stay.")] = 1,
    keep_every: Annotated[int, typer.Option(min=0, help="Multiples of this step stay, too.")] = 0,
) -> None:
    """Remove old checkpoints.  The best one stays; nothing goes unless the newest one verifies.

    dist-lm checkpoints prune runs/demo

    dist-lm checkpoints prune runs/demo --keep 2

    dist-lm checkpoints prune runs/demo --keep 1 --keep-every 1000
    """
    from dist_lm.checkpoint import commit
    from dist_lm.checkpoint.manifest import Checkpoint

    _, store = _run_and_store(run)
    names = store.names()
    if names:
        newest = Checkpoint.read(store, names[0])
        problem = newest.damage(sorted(newest.files))
        if problem:
            raise DataError(
                f"the newest checkpoint is damaged: {problem}",
                where=newest.folder,
                do="Nothing was removed: an older one may be the only good one.",
            )
    removed = commit.prune(store, commit.Retention(keep, keep_every))
    print(f"removed {', '.join(removed)}" if removed else "nothing to remove")


@checkpoints_app.command("copy")
def checkpoints_copy(
    run: Annotated[str, typer.Argument(help="Run folder, or RUN@STEP; without a step, the newest checkpoint.")],
    to: Annotated[str, typer.Argument(help="Folder or URL that the checkpoint goes into.")],
) -> None:
    """Copy one checkpoint to another place, and verify the copy there.

    dist-lm checkpoints copy runs/demo backup

    dist-lm checkpoints copy runs/demo@1000 s3://bucket/backup

    dist-lm checkpoints copy /shared/runs/x@500 /archive/x
    """
    from dist_lm.checkpoint.copying import copy_checkpoint
    from dist_lm.checkpoint.manifest import Checkpoint
    from dist_lm.checkpoint.store import open_store, step_name

    folder, _, step = run.partition("@")
    if step and not step.isdecimal():
        raise ConfigError(f"{run}: `{step}` is not a step", do="Write RUN@1000.")
    _, store = _run_and_store(Path(folder))
    names = [name for name in store.names() if not step or name == step_name(int(step))]
    if not names:
        raise ConfigError(f"{folder} has no checkpoint" + (f" of step {step}" if step else ""))
    copied = copy_checkpoint(Checkpoint.read(store, names[0]), open_store(to))
    print(f"ok: {copied.folder}, {len(copied.files)} files verified")
