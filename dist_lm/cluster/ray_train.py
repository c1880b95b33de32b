"""Ray Train V2 around train(): the same ranks and run folder, on a cluster.

Enters: a configuration, in a process that can reach a Ray cluster.  Leaves: the run's exit code.
Promises: our checkpoint is the truth, not Ray's: a restarted or resubmitted job goes on where the
run folder stands.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from dist_lm import lease
from dist_lm.cluster import ray_cluster
from dist_lm.cluster.jobs import require_shared_run_dir
from dist_lm.cluster.ray_metrics import gauges_of
from dist_lm.cluster.ray_scale import Scale, choose_scale
from dist_lm.cluster.ray_worker import train_on_worker
from dist_lm.config_ray import RaySection
from dist_lm.deepspeed_config import load_run
from dist_lm.disk import disk_errors
from dist_lm.errors import EXIT_CRASH, EXIT_DONE, StopRequested
from dist_lm.run_dir import RunDir
from dist_lm.stop import STOP_SIGNALS

if TYPE_CHECKING:
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from dist_lm.cluster.ray_recovery import Recovery

log = logging.getLogger(__name__)

# Ray's own values cost over a minute a fault.
DEFAULT_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1",
    # Equal lines of several ranks are news, not noise.
    "RAY_DEDUP_LOGS": "0",
}
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
START_FIXED_S = "60"
STOP_AGAIN_S = 1.0
_SIGNALS_S = 0.5
"""How often the main thread looks up from waiting, so that Python runs its signal handlers."""
START_ELASTIC_S = "15"
"""How long a group waits for nodes that Ray believes in, before it takes fewer."""


def run_on_ray(path: Path, overrides: list[str], *, max_restarts: int) -> int:
    """Driver: check the cluster, start the workers, wait for the end; returns the exit code."""
    loaded = load_run(path, overrides)
    run_dir = require_shared_run_dir(loaded, path)
    section = loaded.config.ray
    start_timeout = START_ELASTIC_S if _may_shrink(section) else START_FIXED_S
    for name, value in {**DEFAULT_SETTINGS, START_TIMEOUT: start_timeout}.items():
        os.environ.setdefault(name, value)
    # Relative paths of a recipe count from the working directory, in workers too.
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
    ray_cluster.connect()
    from dist_lm.cluster.ray_recovery import Recovery

    scale = choose_scale(section)
    nodes = ray_cluster.living_nodes()
    ray_cluster.check_nodes(run_dir, nodes)
    # A fresh name each launch: a torn snapshot of Ray's own can then never block a start.
    name = f"{run_dir.name}-{time.time_ns()}"
    storage = RunDir(run_dir).logs / "ray"
    with disk_errors(storage):
        storage.mkdir(parents=True, exist_ok=True)
    final_errors = storage / f"{name}-errors"
    final_errors.mkdir()
    settings = {
        "path": str(path),
        "overrides": overrides,
        "cpu": not scale.use_gpu,
        "supervisor": name,
        "final_errors": str(final_errors),
    }
    recovery = Recovery(
        run_dir,
        final_errors,
        known={node["NodeID"] for node in nodes},
        max_restarts=max_restarts,
    )
    trainer = _trainer(settings, section, scale, name=name, run_dir=run_dir, storage=storage, recovery=recovery)
    with (
        _stop_file_on_signal(RunDir(run_dir).stop_file) as stopped,
        gauges_of(RunDir(run_dir).metrics, run_dir.name),
    ):
        crash = _fit(trainer, RunDir(run_dir), stopped)
    return _end(crash, final_errors, RunDir(run_dir))


def _end(crash: Exception | None, final_errors: Path, run_dir: RunDir) -> int:
    """Tell how the run ended; returns the exit code."""
    told_by = sorted(final_errors.iterdir())
    if told_by:
        told = json.loads(told_by[0].read_text())
        print(told["message"], file=sys.stderr, flush=True)
        return int(told["exit_code"])
    if isinstance(crash, StopRequested):
        print(crash, file=sys.stderr, flush=True)
        # The thread that waits for Ray is still there.  At Python's own exit Ray leaves first, and where
        # that thread asks it something afterwards, it ends the process with code 1.
        os._exit(crash.exit_code)
    if crash is not None:
        cause = getattr(crash, "controller_failure", crash)
        print(
            f"error[crash] {str(cause).splitlines()[0]}\n  tracebacks: {run_dir.errors}",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_CRASH
    return EXIT_DONE


@contextlib.contextmanager
def _stop_file_on_signal(stop_file: Path) -> Iterator[threading.Event]:
    """Ctrl-C and `ray job stop` reach the driver only: the workers learn of it by the run folder's stop file.

    Yields what is set once somebody has asked to stop.  A new group of workers clears the file when
    it begins, so it is written until the run has ended.
    """
    stopped, ended = threading.Event(), threading.Event()

    def keep_asking() -> None:
        stopped.wait()
        while not ended.is_set():
            stop_file.touch()
            ended.wait(STOP_AGAIN_S)

    def on_signal(number: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            os._exit(128 + number)
        stopped.set()

    # Ray has installed a handler that ends this process at once: ours comes after it.
    before = {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    asking = threading.Thread(target=keep_asking, daemon=True)
    asking.start()
    try:
        yield stopped
    finally:
        ended.set()
        stopped.set()
        asking.join()
        stop_file.unlink(missing_ok=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def _may_shrink(section: RaySection) -> bool:
    return section.workers is not None and section.workers.min < section.workers.max


def _trainer(
    settings: dict[str, Any],
    section: RaySection,
    scale: Scale,
    *,
    name: str,
    run_dir: Path,
    storage: Path,
    recovery: Recovery,
) -> DataParallelTrainer:
    from ray.train import FailureConfig, RunConfig, ScalingConfig

    from dist_lm.cluster.ray_backend import RanksConfig, RanksTrainer
    from dist_lm.cluster.ray_spares import Spares, runtime_env

    spare = section.spare_workers
    return RanksTrainer(
        train_on_worker,
        train_loop_config=settings,
        scaling_config=ScalingConfig(
            num_workers=(scale.min_workers, scale.max_workers) if scale.elastic else scale.max_workers,
            use_gpu=scale.use_gpu,
            resources_per_worker=scale.resources_per_worker,
            accelerator_type=section.accelerator_type,
            placement_strategy=section.placement,
            label_selector=section.label_selector or None,
            elastic_resize_monitor_interval_s=section.resize_s,
        ),
        backend_config=RanksConfig(),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            # Restarts are counted in `recovery`: Ray would charge a node's going, too.
            failure_config=FailureConfig(max_failures=-1),
            callbacks=[recovery, Spares(run_dir, section, scale)] if spare else [recovery],
            worker_runtime_env=runtime_env(cpu=not scale.use_gpu) if spare else None,
        ),
    )


def _fit(trainer: DataParallelTrainer, run_dir: RunDir, stopped: threading.Event) -> Exception | None:
    """Train on the workers; returns what Ray gave up with, or StopRequested where nobody trained."""
    failures: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit()
        except Exception as error:
            failures.append(error)

    beats: dict[str, Any] = {}

    def nobody_trains() -> bool:
        held = lease.read(run_dir.leases)
        now = (held.get("attempt"), held.get("beats"), held.get("released"))
        if now != beats.get("seen"):
            beats.update(seen=now, at=time.monotonic())
        return bool(time.monotonic() - beats["at"] > lease.TTL_S)

    # In the main thread Ray would answer Ctrl-C itself, by ending the workers without a checkpoint.
    training = threading.Thread(target=fit, daemon=True)
    training.start()
    while training.is_alive():
        training.join(timeout=_SIGNALS_S)
        if stopped.is_set() and nobody_trains():
            # The workers wait for nodes, or have not begun: there is nothing to save.
            return StopRequested("stopped before a group of workers trained", where=str(run_dir.path))
    return failures[0] if failures else None
