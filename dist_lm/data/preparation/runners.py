"""Who runs the tasks: processes of this machine, or Ray.

Enters: an importable function and its items.  Leaves: the results in the order of the items.
Promises: the results do not depend on who runs them; an error of a task is raised here.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from dist_lm.data.process_pool import ordered_map
from dist_lm.errors import DistLMError, EnvironmentFault
from dist_lm.ray_connection import join

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD_PER_CORE = 3


def run_tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    ray: bool,
    doing: str,
    gpu: bool = False,
) -> Generator[Result, None, None]:
    """Results in order.  With `ray`, tasks of the cluster that this process reaches, with a GPU each if `gpu`;
    `workers` is not looked at."""
    if ray:
        return _on_ray(function, items, doing, gpu=gpu)
    return ordered_map(function, items, workers=workers, doing=doing)


def ray_slots() -> tuple[int, bool]:
    """How many tasks the Ray cluster runs side by side: one a GPU where there are any (True), else one a core."""
    join()
    import ray

    has = ray.cluster_resources()
    gpus = int(has.get("GPU", 0))
    return (gpus, True) if gpus else (max(1, int(has.get("CPU", 1))), False)


def _on_ray(
    function: Callable[[Item], Result], items: Iterable[Item], doing: str, *, gpu: bool
) -> Generator[Result, None, None]:
    import ray

    join()
    task = ray.remote(num_cpus=0 if gpu else 1, num_gpus=int(gpu))(_one_thread_wide)
    ahead = max(1, int(ray.cluster_resources().get("GPU" if gpu else "CPU", 1))) * _AHEAD_PER_CORE
    waiting: deque[ray.ObjectRef] = deque()
    try:
        for item in items:
            waiting.append(task.remote(function, item))
            if len(waiting) > ahead:
                yield _result(waiting.popleft(), doing)
        while waiting:
            yield _result(waiting.popleft(), doing)
    finally:
        for reference in waiting:
            ray.cancel(reference)


def _one_thread_wide(function: Callable[[Item], Result], item: Item) -> Result:
    # One task a core: threads inside the Rust tokenizer would only fight over the cores.
    os.environ["RAYON_NUM_THREADS"] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    return function(item)


def _result(reference: object, doing: str) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DistLMError):
            raise error.cause from error
        raise
    except ray.exceptions.RayError as error:
        raise EnvironmentFault(
            f"a Ray task was lost while {doing}",
            why=str(error).splitlines()[0],
            do="Run the same command again: what is done is not done again.",
        ) from error
