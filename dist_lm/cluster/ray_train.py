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
from typing import Any

from dist_lm.cluster import ray_cluster
from dist_lm.cluster.jobs import require_shared_run_dir
from dist_lm.cluster.ray_cluster import Scale
from dist_lm.cluster.ray_metrics import gauges_of
from dist_lm.config_files import LoadedConfig
from dist_lm.config_ray import RaySection
from dist_lm.deepspeed_config import load_run
from dist_lm.disk import disk_errors, write_json
from dist_lm.errors import EXIT_CRASH, EXIT_DONE, DistLMError
from dist_lm.run_dir import RunDir

log = logging.getLogger(__name__)

# Ray's own values cost over a minute a fault.
DEFAULT_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "60",
    # Equal lines of several ranks are news, not noise.
    "RAY_DEDUP_LOGS": "0",
}
COLLECTIVE_TIMEOUT_S = 600
START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
START_FIXED_S = "60"
STOP_AGAIN_S = 1.0
START_ELASTIC_S = "15"
"""After a node's death Ray asks for the old number once more, and waits this long before it takes fewer."""


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
    scale = ray_cluster.choose_scale(section)
    ray_cluster.check_nodes(run_dir)
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
        "final_errors": str(final_errors),
    }
    with _stop_file_on_sigterm(RunDir(run_dir).stop_file), gauges_of(RunDir(run_dir).metrics, run_dir.name):
        crash = _fit(settings, section, scale, name=name, storage=storage, max_restarts=max_restarts)
    told_by = sorted(final_errors.iterdir())
    if told_by:
        told = json.loads(told_by[0].read_text())
        print(told["message"], file=sys.stderr, flush=True)
        return int(told["exit_code"])
    if crash is not None:
        print(
            f"error[crash] {str(crash).splitlines()[0]}\n  tracebacks: {RunDir(run_dir).errors}",
            file=sys.stderr,
            flush=True,
        )
        return EXIT_CRASH
    return EXIT_DONE


@contextlib.contextmanager
def _stop_file_on_sigterm(stop_file: Path) -> Iterator[None]:
    """`ray job stop` signals the driver only: the workers learn of it by the run folder's stop file.

    A new group of workers clears the file when it begins, so it is written until the run has ended.
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
    before = signal.signal(signal.SIGTERM, on_signal)
    asking = threading.Thread(target=keep_asking, daemon=True)
    asking.start()
    try:
        yield
    finally:
        ended.set()
        stopped.set()
        asking.join()
        stop_file.unlink(missing_ok=True)
        signal.signal(signal.SIGTERM, before)


def _may_shrink(section: RaySection) -> bool:
    return section.workers is not None and section.workers.min < section.workers.max


def _fit(
    settings: dict[str, Any],
    section: RaySection,
    scale: Scale,
    *,
    name: str,
    storage: Path,
    max_restarts: int,
) -> Exception | None:
    """Train on the workers; returns what Ray gave up with."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
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
        torch_config=TorchConfig(backend="nccl" if scale.use_gpu else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            failure_config=FailureConfig(max_failures=max_restarts),
        ),
    )
    try:
        trainer.fit()
    except Exception as error:
        return error
    return None


def train_on_worker(settings: dict[str, Any]) -> None:
    """Runs on each worker, in Ray's training thread.

    Ray starts the group again after any exception.  Where that cannot help, each rank leaves its
    error in a file for the driver, and the workers end as if they were done.
    """
    final_errors = Path(settings["final_errors"])
    if any(final_errors.iterdir()):
        return
    if settings["cpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from dist_lm.worker import prepare_environment, report_failure, speak

    prepare_environment()
    rank = int(os.environ["RANK"])
    speak(rank)
    loaded = load_run(Path(settings["path"]), settings["overrides"])
    try:
        _train(loaded, cpu=settings["cpu"])
    except DistLMError as error:
        from dist_lm.ranks import disconnect

        # The driver tells errors that end the run.
        report_failure(loaded, rank, str(error), tell=error.restart_helps)
        if error.restart_helps:
            raise
        write_json(final_errors / f"rank-{rank:05d}.json", {"exit_code": error.exit_code, "message": str(error)})
        # Peers that do not know of this error see the connection end, and Ray restarts the group.
        disconnect()
    except Exception as error:
        report_failure(loaded, rank, f"error[crash] {type(error).__name__}: {error}", tell=False)
        raise


def _train(loaded: LoadedConfig, *, cpu: bool) -> None:
    from dist_lm import ops
    from dist_lm.ranks import Ranks
    from dist_lm.stop import StopFlag
    from dist_lm.train import train
    from dist_lm.worker import summary

    if cpu:
        ops.build_cpu_op()
    ranks = Ranks.connect()
    outcome = train(loaded, ranks, stop=StopFlag(), launcher="ray")
    if ranks.is_first:
        log.info("%s", summary(loaded, outcome))
