"""Runs as jobs of a Ray cluster: submit, look, stop, submit again; from any machine that reaches the head.

Enters: a configuration and the address of the head's dashboard.  Leaves: jobs.
Promises: what the cluster would refuse is refused before the upload; one run folder has one job; a
stop leaves the run the time to save.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_lm.cluster.job_package import EXCLUDES, check_package
from dist_lm.config_files import LoadedConfig
from dist_lm.errors import EXIT_CRASH, EXIT_DONE, ConfigError, EnvironmentFault, StopRequested
from dist_lm.ray_connection import expect_answer
from dist_lm.recipes.shipped import PREFIX

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_S = 300
"""What a job is given to save after a stop; Ray's own value is 3 s."""
START_S = 60.0
"""How long a head that starts is waited for; each refusal takes 10 s."""
_NOT_YET = "No available agent"
_ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
_RUN_DIR, _NAME = "dist_lm_run_dir", "dist_lm_name"
_OVERRIDING = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_POLL_S = 0.5


@dataclass(frozen=True)
class Job:
    """One submission of a run."""

    id: str
    name: str
    run_dir: str
    status: str
    message: str
    entrypoint: str
    driver_exit_code: int | None
    started_ms: int

    @property
    def ended(self) -> bool:
        return self.status in _ENDED

    @property
    def exit_code(self) -> int:
        """The driver's exit code, as far as Ray tells it."""
        if self.status == "STOPPED":
            return StopRequested.exit_code
        if self.driver_exit_code is None:
            return EXIT_DONE if self.status == "SUCCEEDED" else EXIT_CRASH
        return self.driver_exit_code

    def line(self) -> str:
        return f"{self.id}  {self.status}  {self.run_dir}"


def require_shared_run_dir(loaded: LoadedConfig, path: Path) -> Path:
    """The run folder.  Raises ConfigError where it would be in the job's temporary folder."""
    run_dir: Path = loaded.config.run.dir
    if not run_dir.is_absolute():
        raise ConfigError(
            f"run.dir `{run_dir}` is relative",
            where=str(path),
            why="A Ray job runs in a temporary copy of the working directory, which goes with the job.",
            do="Give an absolute path that every node reaches, such as run.dir=/shared/runs/x.",
        )
    return run_dir


class Jobs:
    """The jobs of one cluster."""

    def __init__(self, address: str | None) -> None:
        """Raises EnvironmentFault where nobody answers, or the token is wrong."""
        self.address = address or os.environ.get(_OVERRIDING[0]) or DEFAULT_ADDRESS
        if not self.address.startswith(("http://", "https://")):
            raise ConfigError(
                f"`{self.address}` is not the address of a dashboard",
                where="--address",
                do="Write http://HEAD:8265; `ray dashboard cluster/aws.yaml` makes a tunnel to it.",
            )
        host = self.address.partition("://")[2].split("/")[0]
        expect_answer(host if ":" in host else f"{host}:{443 if self.address.startswith('https') else 80}", "--address")
        # Ray lets them override the address that a person wrote.
        for variable in _OVERRIDING:
            os.environ.pop(variable, None)
        from ray.job_submission import JobSubmissionClient

        try:
            self._client = JobSubmissionClient(self.address)
            self._client.list_jobs()
        except Exception as error:
            raise EnvironmentFault(
                f"the Ray cluster at {self.address} does not take us",
                why=str(error).strip().splitlines()[0],
                do="With token authentication, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or ~/.ray/auth_token.",
            ) from error

    def all(self) -> list[Job]:
        """The jobs that `dist-lm` submitted, oldest first."""
        listed = self._client.list_jobs()
        found = [_job(details) for details in listed if details.submission_id and _NAME in (details.metadata or {})]
        return sorted(found, key=lambda job: job.started_ms)

    def find(self, name: str) -> Job:
        """The newest job of this name or id."""
        found = [job for job in self.all() if name in (job.name, job.id)]
        if not found:
            names = sorted({job.name for job in self.all()})
            raise EnvironmentFault(
                f"the cluster has no job `{name}`",
                where=self.address,
                do=f"It has {', '.join(names)}." if names else "It has no job of dist-lm.",
            )
        return found[-1]

    def submit(self, entrypoint: str, *, name: str, run_dir: str, folder: Path, env: dict[str, str]) -> str:
        """Id of the new job.  Raises EnvironmentFault where the name or the run folder is in use."""
        before = self.all()
        for job in before:
            if not job.ended and (job.name == name or job.run_dir == run_dir):
                what = f"the job name `{name}`" if job.name == name else f"the run folder {run_dir}"
                raise EnvironmentFault(
                    f"{what} is in use",
                    where=self.address,
                    why=f"Job {job.id} is {job.status}, with run folder {job.run_dir}.",
                    do=f"Stop it with `dist-lm job stop {job.name}`, or choose another --name and run.dir.",
                )
        check_package(folder)
        number = 1 + sum(job.name == name for job in before)
        return self._send(
            entrypoint=entrypoint,
            submission_id=f"{name}-{number}",
            runtime_env={
                "working_dir": str(folder),
                "excludes": list(EXCLUDES),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), "RAY_DEDUP_LOGS": "0", **env},
            },
            metadata={_NAME: name, _RUN_DIR: run_dir},
        )

    def _send(self, **job: Any) -> str:
        """Id of the new job.  Raises EnvironmentFault where the head does not take it."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                job_id: str = self._client.submit_job(**job)
                return job_id
            except RuntimeError as error:
                # The dashboard of a head that starts answers before the process that runs jobs is there.
                if _NOT_YET in str(error) and time.monotonic() < deadline:
                    continue
                # A traceback of the head's ends with what matters.
                told = [line.strip() for line in str(error).splitlines() if len(line.strip()) > 1]
                raise EnvironmentFault(
                    f"the head does not take the job {job['submission_id']}",
                    where=self.address,
                    why=told[-1],
                    do="Choose another --name where the id is taken; else see dashboard_agent.log on the head.",
                ) from error

    def resume(self, name: str, folder: Path) -> str:
        """Submit the newest job of this name once more: its run goes on."""
        job = self.find(name)
        return self.submit(job.entrypoint, name=job.name, run_dir=job.run_dir, folder=folder, env={})

    def stop(self, name: str) -> Job:
        """Ask the job to stop, and wait until it has saved and ended."""
        job = self.find(name)
        if not job.ended:
            self._client.stop_job(job.id)
        return self.wait(job.id)

    def wait(self, job_id: str) -> Job:
        while not (job := self.find(job_id)).ended:
            time.sleep(_POLL_S)
        return job

    def follow(self, job_id: str) -> Job:
        """Print the job's log to its end."""

        async def tail() -> None:
            async for text in self._client.tail_job_logs(job_id):
                sys.stdout.write(text)
                sys.stdout.flush()

        asyncio.run(tail())
        return self.wait(job_id)


def entrypoint(config: Path, overrides: Sequence[str], folder: Path) -> str:
    """The command of the driver.  The configuration must lie in the folder that is sent, or be one that came
    with dist_lm."""
    words = ["python", "-m", "dist_lm", "train", "--ray", "-c"]
    if str(config).startswith(PREFIX):
        return shlex.join([*words, str(config), *overrides])
    try:
        relative = config.resolve().relative_to(folder.resolve())
    except ValueError:
        raise ConfigError(
            f"{config} does not lie in {folder}",
            where="-c",
            why="A job sees the files of the working directory that is sent with it.",
            do="Start in the folder that holds it, or name one with --working-dir.",
        ) from None
    return shlex.join([*words, str(relative), *overrides])


def _job(details: Any) -> Job:
    metadata = details.metadata or {}
    return Job(
        id=details.submission_id,
        name=metadata[_NAME],
        run_dir=metadata.get(_RUN_DIR, ""),
        status=str(getattr(details.status, "value", details.status)),
        message=details.message or "",
        entrypoint=details.entrypoint,
        driver_exit_code=details.driver_exit_code,
        started_ms=details.start_time or 0,
    )
