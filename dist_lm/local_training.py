"""Training on this machine, for the command line and for Python.

Enters: a YAML file, overrides, a number of ranks.  Leaves: an exit code, or how the run is.
Promises: what is wrong with the configuration is said before a process is started.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dist_lm.cluster.local import LocalLaunch, launch
from dist_lm.config_files import LoadedConfig
from dist_lm.deepspeed_config import load_run
from dist_lm.errors import EXIT_CRASH, EXIT_DONE, ConfigError, DistLMError
from dist_lm.run_dir import RunDir
from dist_lm.status import Status, status_of


class RunCrashed(DistLMError):
    """A run that Python started ended for an unforeseen reason, and the launcher's restarts are used up."""

    kind = "crash"
    exit_code = EXIT_CRASH


def start(loaded: LoadedConfig, config: Path, overrides: Sequence[str], *, cpu: int, max_restarts: int) -> int:
    """Run all ranks to their end; returns the exit code of the run.  `cpu`: ranks, 0 for one a GPU."""
    num_ranks = cpu or _visible_gpus()
    return launch(LocalLaunch(config, overrides, num_ranks, bool(cpu), max_restarts, loaded.config.run.dir))


def run_training(config: Path, overrides: Sequence[str], *, cpu: int, max_restarts: int) -> Status:
    """See dist_lm.run_training."""
    loaded = load_run(config, overrides)
    code = start(loaded, config, overrides, cpu=cpu, max_restarts=max_restarts)
    folder = RunDir(loaded.config.run.dir)
    if code == EXIT_DONE:
        return status_of(folder)
    kinds: dict[int, type[DistLMError]] = {kind.exit_code: kind for kind in DistLMError.__subclasses__()}
    attempts = status_of(folder).attempts if folder.identity.exists() else []
    told = str(attempts[-1].get("what", "")) if attempts else ""
    raise kinds.get(code, RunCrashed)(
        f"the run ended with exit code {code}",
        where=str(folder.path),
        why=told,
        do="The ranks told what happened above; tracebacks are in errors/ of the run folder.",
    )


def _visible_gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(
            "no GPU is visible, and no number of CPU ranks was given",
            do="Add --cpu 2 (in Python cpu=2) to train with two processes on the CPU.",
        )
    return count
