"""Verbs about clusters: `dist-lm cluster check`, `submit`, `job`.

Enters: a command line.  Leaves: an exit code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dist_lm.errors import ConfigError

Address = Annotated[
    str | None, typer.Option(help="Dashboard of the head, such as http://127.0.0.1:8265 (RAY_API_SERVER_ADDRESS).")
]
JobName = Annotated[str, typer.Argument(help="Name or id of a job.")]
WorkingDir = Annotated[Path, typer.Option(help="Folder that is sent with the job.")]
job_app = typer.Typer(
    help="Jobs on a Ray cluster: status, logs, stop, resume.\n\n"
    "dist-lm job status --address http://127.0.0.1:8265\n\n"
    "dist-lm job logs x\n\n"
    "dist-lm job stop x",
    no_args_is_help=True,
)
cluster_app = typer.Typer(
    help="Cluster files: check them before a cluster is paid for.\n\n"
    "dist-lm cluster check cluster/aws.yaml\n\n"
    "dist-lm cluster check cluster/kuberay/*.yaml\n\n"
    "dist-lm cluster check cluster/kuberay/gpu",
    no_args_is_help=True,
)


def add_verbs(app: typer.Typer) -> None:
    """Add these verbs to `dist-lm`."""
    app.add_typer(cluster_app, name="cluster")
    app.command()(submit)
    app.add_typer(job_app, name="job")


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

    dist-lm cluster check cluster/kuberay/gpu
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


def submit(
    config: Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show the log; end with the run's exit code.")] = False,
    name: Annotated[str, typer.Option(help="Name of the job; else that of the run folder.")] = "",
    working_dir: WorkingDir = Path("."),
    env: Annotated[list[str] | None, typer.Option(help="NAME=VALUE for driver and workers; repeatable.")] = None,
) -> None:
    """Run the training on a Ray cluster; this machine may go away.

    dist-lm submit -c my.yaml run.dir=/shared/runs/x --address http://127.0.0.1:8265 --follow

    dist-lm submit -c my.yaml run.dir=/shared/runs/x ray.workers=8 --name try-8

    dist-lm submit -c recipe:bert-mini-docs run.dir=/shared/runs/bert --env OMP_NUM_THREADS=4
    """
    from dist_lm.cluster.jobs import Jobs, entrypoint, require_shared_run_dir
    from dist_lm.deepspeed_config import load_run

    given = overrides or []
    run_dir = require_shared_run_dir(load_run(config, given), config)
    command = entrypoint(config, given, working_dir)
    variables = dict(word.partition("=")[::2] for word in env or [])
    jobs = Jobs(address)
    job_id = jobs.submit(command, name=name or run_dir.name, run_dir=str(run_dir), folder=working_dir, env=variables)
    print(f"submitted {job_id}; `dist-lm job status {job_id}`, `dist-lm job stop {job_id}`", flush=True)
    if follow:
        raise typer.Exit(jobs.follow(job_id).exit_code)


@job_app.command("status")
def job_status(
    name: Annotated[str, typer.Argument(help="Name or id of a job; without it, all.")] = "", address: Address = None
) -> None:
    """What the cluster says of jobs; `dist-lm status RUN` says more where the run folder is reached.

    dist-lm job status

    dist-lm job status x

    dist-lm job status --address http://127.0.0.1:8265
    """
    from dist_lm.cluster.jobs import Jobs

    jobs = Jobs(address)
    for job in [jobs.find(name)] if name else jobs.all():
        print(job.line())
        if name:
            print(f"  {job.message}")


@job_app.command("logs")
def job_logs(name: JobName, address: Address = None) -> None:
    """Show the log of a job to its end; the exit code is the run's.

    dist-lm job logs x

    dist-lm job logs x > x.log

    dist-lm job logs x --address http://127.0.0.1:8265
    """
    from dist_lm.cluster.jobs import Jobs

    jobs = Jobs(address)
    raise typer.Exit(jobs.follow(jobs.find(name).id).exit_code)


@job_app.command("stop")
def job_stop(name: JobName, address: Address = None) -> None:
    """Ask a job to save and end; waits for that.

    dist-lm job stop x

    dist-lm job stop raysubmit_h8Kz1

    dist-lm job stop x --address http://127.0.0.1:8265
    """
    from dist_lm.cluster.jobs import Jobs

    print(Jobs(address).stop(name).line())


@job_app.command("resume")
def job_resume(name: JobName, address: Address = None, working_dir: WorkingDir = Path(".")) -> None:
    """Submit a job once more: its run goes on where it was.

    dist-lm job resume x

    dist-lm job resume x --working-dir my-project

    dist-lm job resume x --address http://127.0.0.1:8265
    """
    from dist_lm.cluster.jobs import Jobs

    print(f"submitted {Jobs(address).resume(name, working_dir)}")
