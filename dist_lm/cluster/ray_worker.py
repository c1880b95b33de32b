"""One worker of Ray Train: a rank, from its environment to what Ray is told of its end.

Enters: what the driver sends to each worker.  Leaves: a run folder; files with errors that end the run.
Promises: Ray starts the group again only where that can help; when a node is taken away, or more come,
the group saves and makes way for the next one, and no restart is charged for that.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_lm import garbage
from dist_lm.config_files import LoadedConfig
from dist_lm.deepspeed_config import load_run
from dist_lm.disk import write_json
from dist_lm.errors import DistLMError, StopRequested
from dist_lm.lease import SUPERVISOR_VARIABLE
from dist_lm.run_dir import RunDir
from dist_lm.stop import first_hand

if TYPE_CHECKING:
    from dist_lm.ranks import Ranks
    from dist_lm.stop import StopFlag

log = logging.getLogger(__name__)

NODE_GOES = "a node is taken away"
NODES_COME = "there are more nodes"
_NOTICE_S = 0.2


def train_on_worker(settings: dict[str, Any]) -> None:
    """Runs on each worker, in Ray's training thread.

    Ray starts the group again after any exception.  Where that cannot help, each rank leaves its
    error in a file for the driver, and the workers end as if they were done.
    """
    garbage.collect_seldom()
    final_errors = Path(settings["final_errors"])
    # Ray ends one group before it starts the next: the run's lease passes on at once.
    os.environ[SUPERVISOR_VARIABLE] = settings["supervisor"]
    if settings["cpu"]:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from dist_lm.worker import prepare_environment, report_failure, speak

    prepare_environment()
    from dist_lm.ranks import Ranks, disconnect

    rank = int(os.environ["RANK"])
    speak(rank)
    loaded = load_run(Path(settings["path"]), settings["overrides"])
    # A peer that cannot be met has died meanwhile, and Ray starts the group again.
    ranks = Ranks.connect()
    try:
        if not any(final_errors.iterdir()):
            _train(loaded, ranks, cpu=settings["cpu"])
    except DistLMError as error:
        # The driver tells errors that end the run.
        if not isinstance(error, StopRequested):
            report_failure(loaded, rank, str(error), tell=error.restart_helps)
        if error.restart_helps:
            raise
        write_json(final_errors / f"rank-{rank:05d}.json", {"exit_code": error.exit_code, "message": str(error)})
    except GroupChanges:
        raise
    except Exception as error:
        report_failure(loaded, rank, f"error[crash] {type(error).__name__}: {error}", tell=False)
        raise
    # Peers that do not know of an error see the connection end, and Ray restarts the group.
    disconnect()


def _train(loaded: LoadedConfig, ranks: Ranks, *, cpu: bool) -> None:
    from dist_lm import ops
    from dist_lm.stop import StopFlag
    from dist_lm.summary import summary
    from dist_lm.train import train

    if cpu:
        ops.build_cpu_op()
    stop = StopFlag()
    _stop_at_notice(stop, RunDir(loaded.config.run.dir).regroup_file)
    try:
        outcome = train(loaded, ranks, stop=stop, launcher="ray")
    except StopRequested:
        _leave_group(ranks, stop)
        raise
    if ranks.is_first:
        log.info("%s", summary(loaded.config, outcome))


def _stop_at_notice(stop: StopFlag, regroup_file: Path) -> None:
    """Let Ray's notice, and the controller's wish for a larger group, raise the flag: all ranks save after
    the step that they are in."""
    from ray.train.v2._internal.execution.context import get_train_context

    # Ray's public question, get_preemption_info, is a barrier of all ranks.
    notice = get_train_context().preemption_context

    def watch() -> None:
        while not stop.is_asked():
            if notice.preemption_info is not None:
                stop.request(NODE_GOES)
            elif regroup_file.exists():
                stop.request(NODES_COME)
            time.sleep(_NOTICE_S)

    threading.Thread(target=watch, daemon=True).start()


def _leave_group(ranks: Ranks, stop: StopFlag) -> None:
    """Where only a change of nodes stopped the ranks, raise GroupChanges, for Ray to start the next group:
    a return it would take for the end of the run.  Returns where a person asked to stop."""
    reasons = set(first_hand(ranks.gather(stop.reason)))
    if not reasons <= {NODE_GOES, NODES_COME}:
        return
    told = " and ".join(sorted(reasons))
    if ranks.is_first:
        log.info("%s: the next group of workers goes on", told)
    ranks.barrier()
    raise GroupChanges(told) from None


class GroupChanges(Exception):
    """Not the run's end, and no failure (ray_recovery.py)."""
