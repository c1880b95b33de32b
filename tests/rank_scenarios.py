"""Real gloo ranks that train several small runs one after the other in one process group.

A run of six steps costs a second, the imports of a rank ten: all ranks are forked from one process that
has them.  `train_scenarios` starts the ranks once and hands them a list of configurations.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_S = 600


def scenario(data: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A small BERT on the topics data; `changes` are dotted keys with `__` for the dot.

    Two are no keys: `fault` arms a place in the code for this run (dist_lm/faults.py), `samples` names
    the folder of its sample log (dist_lm/sample_log.py).
    """
    config: dict[str, Any] = {
        "task": {"name": "mlm"},
        "model": {
            "size": "tiny",
            "overrides": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 64,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
        },
        "data": {
            "train": str(data / "pairs" / "train"),
            "heldout": str(data / "pairs" / "heldout"),
            "tokenizer": str(data / "tokenizer"),
            "lanes": 4,
            "era": 64,
        },
        "batch": {"global": 32, "micro": 32},
        "optim": {"lr": 2e-3, "clip": 0.5, "schedule": {"kind": "linear", "warmup_steps": 1}},
        "run": {"dir": str(run_dir), "steps": 6, "seed": 3, "log_every": 1, "save_every": 3, "keep": 5},
        "zero": 0,
    }
    for dotted, value in changes.items():
        *sections, name = dotted.split("__")
        section = config
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return config


def train_scenarios(folder: Path, configs: list[dict[str, Any]], *, num_ranks: int) -> None:
    """Train all configurations on `num_ranks` gloo ranks; fails if one of them fails."""
    outcomes = attempt_scenarios(folder, configs, num_ranks=num_ranks)
    assert [outcome["message"] for outcome in outcomes] == [""] * len(configs)


def attempt_scenarios(folder: Path, configs: list[dict[str, Any]], *, num_ranks: int) -> list[dict[str, Any]]:
    """Exit code of each configuration, on which all ranks must agree, and the first rank's message."""
    from dist_lm.cluster.local import free_port

    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"plan-{num_ranks}.json"
    plan.write_text(json.dumps(configs))
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    common |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    logs = [folder / f"ranks-{num_ranks}-{rank}.log" for rank in range(num_ranks)]
    context = server_of_ranks()
    ranks = [
        context.Process(target=_rank, args=(plan, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log))
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(TIMEOUT_S)
    finally:
        for process in ranks:
            process.kill()
            process.join()
    codes = [process.exitcode for process in ranks]
    tails = "\n".join(log.read_text()[-1500:] for log in logs)
    assert codes == [0] * num_ranks, tails
    outcomes = [json.loads(Path(f"{plan}.{rank}").read_text()) for rank in range(num_ranks)]
    codes_of_ranks = [[outcome["exit_code"] for outcome in of_rank] for of_rank in outcomes]
    assert all(codes == codes_of_ranks[0] for codes in codes_of_ranks), outcomes
    first: list[dict[str, Any]] = outcomes[0]
    return first


def losses(run_dir: Path) -> dict[int, float]:
    """Training loss of each step."""
    from dist_lm.metrics import read_metrics

    return {record["step"]: record["loss"] for record in read_metrics(run_dir / "metrics.jsonl", "train")}


def heldout_loss(run_dir: Path) -> float:
    """Held-out loss at the end of the run."""
    from dist_lm.metrics import read_metrics

    return float(read_metrics(run_dir / "metrics.jsonl", "eval")[-1]["loss"])


@contextlib.contextmanager
def one_thread_a_rank() -> Iterator[None]:
    """Variables for ranks on the CPU whose sums are equal; those of before come back."""
    with pytest.MonkeyPatch.context() as patched:
        common = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        for name, value in {**common, "GLOO_SOCKET_IFNAME": "lo"}.items():
            patched.setenv(name, value)
        yield


def launch_here(recipe: Path, run_dir: Path, *, num_ranks: int = 2, meanwhile: Callable[[], None]) -> int:
    """One attempt of the local launcher in this process, from the server that all tests share; its exit code.

    `meanwhile` runs in a thread; what it raises is raised here.
    """
    from dist_lm.cluster.local import LocalLaunch, launch

    server_of_ranks()
    with one_thread_a_rank(), ThreadPoolExecutor(1) as pool:
        told = pool.submit(meanwhile)
        code = launch(LocalLaunch(recipe, [], num_ranks, True, 0, run_dir))
        told.result()
    return code


def server_of_ranks() -> ForkServerContext:
    """One process that imports everything once; ranks of all tests are forked from it."""
    from dist_lm.cluster.rank_process import fork_server

    context = fork_server()
    with one_thread_a_rank():
        forkserver.ensure_running()
    return context


def _rank(plan: Path, variables: dict[str, str], log: Path) -> None:
    """One rank's process: trains all configurations."""
    with log.open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(variables)
    from dist_lm.worker import prepare_environment

    prepare_environment()
    from dist_lm.config import RunConfig
    from dist_lm.config_files import LoadedConfig
    from dist_lm.errors import DistLMError
    from dist_lm.faults import forget
    from dist_lm.ranks import Ranks, disconnect
    from dist_lm.stop import StopFlag
    from dist_lm.train import train

    ranks = Ranks.connect()
    outcomes = []
    for config in json.loads(plan.read_text()):
        forget()
        os.environ["DIST_LM_FAULT"] = config.pop("fault", "")
        os.environ["DIST_LM_SAMPLES"] = config.pop("samples", "")
        loaded = LoadedConfig(RunConfig.model_validate(config), {})
        outcomes.append({"exit_code": 0, "message": ""})
        try:
            train(loaded, ranks, stop=StopFlag(), launcher="test")
        except DistLMError as error:
            outcomes[-1] = {"exit_code": error.exit_code, "message": str(error)}
    Path(f"{plan}.{ranks.rank}").write_text(json.dumps(outcomes))
    ranks.barrier()
    disconnect()
