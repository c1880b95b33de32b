"""What a step may cost, counted and not timed: collectives, reads of the device, Python calls; and that
its weights are DDP's.

Two gloo ranks take a few steps of a small BERT with each way to divide them; what torch's dispatcher
saw, the calls that Python made and the weights afterwards are compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rank_scenarios import scenario, server_of_ranks

STEPS, WORLD_SIZE, TIMEOUT_S = 3, 2, 300
CLOSE = 1e-5
WAYS: dict[str, dict[str, Any]] = {
    f"zero{stage}{suffix}": {"zero": stage, **changes}
    for stage in range(4)
    for suffix, changes in {"": {"batch__micro": 16}, "-accumulate4": {"batch__micro": 4}}.items()
} | {
    "zero1-bf16": {"zero": 1, "precision": "bf16", "batch__micro": 16},
    "zero2-bf16-accumulate4": {"zero": 2, "precision": "bf16", "batch__micro": 4},
}
SMALL_BUCKETS: dict[str, tuple[int, bool]] = {
    "zero1-small-buckets": (1, True),
    "zero1-small-buckets-late": (1, False),
    "zero2-small-buckets": (2, True),
}
"""Stage, and whether buckets are reduced beside the backward pass."""
GATHERED: dict[str, dict[str, Any]] = {
    "zero3-small-buckets": {"stage3_prefetch_bucket_size": 3000},
    "zero3-deepspeeds-hooks": {"stage3_max_live_parameters": 1000},
}
"""Settings of stage 3: weights that come in many buckets, and weights that may not all be whole at one time."""
OURS = [name for name in WAYS if name.startswith(("zero1", "zero2"))]


class Counted(TorchDispatchMode):
    """Collectives with their bytes, and values that the host waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func.name().split("::")
        if namespace == "c10d":
            self.calls[name] += 1
            first = args[0] if isinstance(args[0], list | tuple) else [args[0]]
            tensors = [value for value in first if isinstance(value, torch.Tensor)]
            self.bytes[name] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        elif name == "_local_scalar_dense":
            self.calls["reads"] += 1
        return func(*args, **(kwargs or {}))


def count_python_calls(work: Any) -> int:
    calls = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls
        calls += event == "call"

    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(None)
    return calls


def _rank(plan: Path, variables: dict[str, str]) -> None:
    with (plan.parent / f"log-{variables['RANK']}").open("wb") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(variables)
    from dist_lm.ranks import Ranks, disconnect

    torch.set_num_threads(1)
    ranks = Ranks.connect()
    found = {name: _measure(config, ranks) for name, config in json.loads(plan.read_text()).items()}
    torch.save(found, f"{plan}.{ranks.rank}")
    ranks.barrier()
    disconnect()


def _measure(config: dict[str, Any], ranks: Any) -> dict[str, Any]:
    """STEPS steps of dist_lm, or of a DDP loop on the same rows where `zero` is "ddp"."""
    from dist_lm.assemble import assemble
    from dist_lm.config import RunConfig
    from dist_lm.config_files import LoadedConfig
    from dist_lm.data.stream import Stream
    from dist_lm.stop import StopFlag

    as_ddp = config["zero"] == "ddp"
    loaded = LoadedConfig(RunConfig.model_validate({**config, "zero": 0} if as_ddp else config), {})
    parts = assemble(loaded, ranks, stop=StopFlag(), launcher="test")
    task, optim = parts.task, loaded.config.optim
    columns = task.partner_columns
    step = _ddp_step(parts.engine.module, optim) if as_ddp else None
    sizes: list[int] = []
    optimizer = parts.engine.deepspeed_engine.optimizer
    if parts.engine.stage in (1, 2):
        sizes = [flat.numel() for flat in optimizer.bit16_groups_flat]
    counted, calls, padded = Counted(), 0, 0
    with Stream(
        parts.data, global_rows=32, rank=ranks.rank, world_size=ranks.world_size, partner_columns=columns
    ) as stream:
        for number in range(STEPS):
            rows = next(stream)
            micro_batches = [task.collate(part) for part in task.divide(rows.rows, parts.plan)]
            local = [float(sum(part.targets[name] for part in micro_batches)) for name in task.objectives]
            targets = dict(zip(task.objectives, ranks.sum(local), strict=True))

            def work(micro_batches: Any = micro_batches, targets: Any = targets, position: int = rows.position) -> None:
                if step is not None:
                    step(micro_batches, targets)
                else:
                    parts.engine.step(micro_batches, global_targets=targets, learning_rate=optim.lr, position=position)

            if number == STEPS - 2:
                padded = sum("attention_mask" in part.inputs for part in micro_batches)
                with counted:
                    work()
            elif number == STEPS - 1:
                calls = count_python_calls(work)
            else:
                work()
    parameters = dict(parts.engine.module.named_parameters())
    weights = _whole(parts.engine, parameters)
    found = {
        "calls": dict(counted.calls),
        "bytes": dict(counted.bytes),
        "python": calls,
        "padded": padded,
        "weights": weights,
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in parameters.values()),
        "tensors": len(parameters),
        "flat": sizes,
        "compiler": "torch._inductor.compile_fx" in sys.modules,
    }
    parts.attempt.end(None)
    parts.engine.close()
    return found


def _whole(engine: Any, parameters: dict[str, Any]) -> dict[str, torch.Tensor]:
    import deepspeed

    gathered = contextlib.nullcontext()
    if engine.stage == 3:
        gathered = deepspeed.zero.GatheredParameters([*parameters.values()])
    with gathered:
        return {name: p.detach().float().clone() for name, p in parameters.items()}


def _ddp_step(module: Any, optim: Any) -> Any:
    from dist_lm.parameters import groups

    optimizer = torch.optim.AdamW(groups(module, optim), lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)
    ddp = torch.nn.parallel.DistributedDataParallel(module)

    def step(micro_batches: Any, targets: dict[str, float]) -> None:
        for number, part in enumerate(micro_batches):
            ddp.require_backward_grad_sync = number == len(micro_batches) - 1
            sums = ddp(**part.inputs)
            sum(sums[f"{name}_loss"] * (WORLD_SIZE / count) for name, count in targets.items()).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), optim.clip)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _measured(configs: dict[str, dict[str, Any]], folder: Path, world_size: int) -> dict[str, dict[str, Any]]:
    """What the first of `world_size` ranks has counted, by name."""
    from dist_lm.cluster.local import free_port

    plan = folder / "plan.json"
    plan.write_text(json.dumps(configs))
    variables = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }
    context = server_of_ranks()
    ranks = [
        context.Process(target=_rank, args=(plan, {**variables, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_S)
        process.kill()
    logs = "\n".join((folder / f"log-{rank}").read_text()[-2000:] for rank in range(world_size))
    assert [process.exitcode for process in ranks] == [0] * world_size, logs
    results: dict[str, dict[str, Any]] = torch.load(f"{plan}.0")
    return results


@pytest.fixture(scope="module")
def found(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gates")
    # Adam's first steps are signs of gradients: a large epsilon keeps rounding from deciding them.
    common = {"optim__eps": 1e-3, "run__steps": 100}
    ways = {**WAYS, "ddp": {"batch__micro": 16}, "ddp-accumulate4": {"batch__micro": 4}}
    configs = {name: scenario(topics_data, folder / name, **common, **changes) for name, changes in ways.items()}
    for name, (stage, overlap) in SMALL_BUCKETS.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": 3000, "overlap_comm": overlap}}))
        configs[name] = scenario(topics_data, folder / name, **common, zero=stage, deepspeed=str(file), batch__micro=16)
    for name, settings in GATHERED.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps({"zero_optimization": settings}))
        configs[name] = scenario(topics_data, folder / name, **common, zero=3, deepspeed=str(file), batch__micro=16)
    for name in ("ddp", "ddp-accumulate4"):
        configs[name]["zero"] = "ddp"
    return _measured(configs, folder, WORLD_SIZE)


def assert_weights_of_ddp(way: dict[str, Any], ddp: dict[str, Any]) -> None:
    assert way["weights"].keys() == ddp["weights"].keys()
    for key, weight in ddp["weights"].items():
        assert (way["weights"][key] - weight).norm() <= CLOSE * weight.norm() + 1e-7, key


@pytest.mark.parametrize("name", OURS)
def test_gradients_are_reduced_once_a_step_and_weights_gathered_once(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    way = found[name]
    element = 2 if name == "zero1-bf16" else 4
    # Two parameter groups (with and without weight decay), each smaller than a bucket; and the norm.
    assert way["calls"]["allreduce_"] == 3
    assert way["bytes"]["allreduce_"] == element * way["parameters"] + 4
    assert way["calls"]["_allgather_base_"] == 2
    weight = 2 if "bf16" in name else 4
    assert way["bytes"]["_allgather_base_"] == weight * sum(way["flat"])
    assert set(way["calls"]) - {"reads"} == {"allreduce_", "_allgather_base_"}


def test_one_rank_at_stage_0_reduces_nothing(
    found: dict[str, dict[str, Any]], topics_data: Path, tmp_path: Path
) -> None:
    alone = scenario(topics_data, tmp_path / "alone", optim__eps=1e-3, run__steps=100, batch__micro=16)
    way = _measured({"alone": alone}, tmp_path, 1)["alone"]
    assert set(way["calls"]) <= {"reads"}
    assert_weights_of_ddp(way, found["ddp"])


@pytest.mark.parametrize("name", [name for name in WAYS if not name.startswith("zero3")])
def test_the_host_waits_for_no_value_of_a_step(found: dict[str, dict[str, Any]], name: str) -> None:
    # transformers looks at each mask that it is given: nothing of a batch without padding is read.
    assert found[name]["calls"].get("reads", 0) == found[name]["padded"]


@pytest.mark.parametrize("name", WAYS)
def test_no_step_waits_for_the_import_of_a_compiler(found: dict[str, dict[str, Any]], name: str) -> None:
    assert not found[name]["compiler"]


@pytest.mark.parametrize("name", ["zero3", "zero3-accumulate4"])
def test_stage_3_gathers_all_weights_together_and_once_a_step(found: dict[str, dict[str, Any]], name: str) -> None:
    way, size = found[name], 4 * found[name]["parameters"]
    assert way["calls"]["_allgather_base_"] == 1
    assert way["bytes"]["_allgather_base_"] <= 1.02 * size


def test_stage_3_scatters_each_gradient_once(found: dict[str, dict[str, Any]]) -> None:
    size = 4 * found["zero3"]["parameters"]
    assert found["zero3"]["bytes"]["_reduce_scatter_base_"] == pytest.approx(size / WORLD_SIZE, rel=0.02)


def test_weights_of_stage_3_come_in_many_buckets(found: dict[str, dict[str, Any]]) -> None:
    assert found["zero3-small-buckets"]["calls"]["_allgather_base_"] > 5
    assert found["zero3-small-buckets"]["bytes"]["_allgather_base_"] <= 1.02 * 4 * found["zero3"]["parameters"]


@pytest.mark.parametrize("name", SMALL_BUCKETS)
def test_many_buckets_hold_the_same_gradients(found: dict[str, dict[str, Any]], name: str) -> None:
    way = found[name]
    assert way["calls"]["allreduce_"] > 10
    assert way["bytes"]["allreduce_"] == 4 * way["parameters"] + 4
    assert_weights_of_ddp(way, found["ddp"])


@pytest.mark.parametrize("name", GATHERED)
def test_however_weights_are_gathered_they_become_those_of_ddp(found: dict[str, dict[str, Any]], name: str) -> None:
    assert_weights_of_ddp(found[name], found["ddp"])


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3"])
@pytest.mark.parametrize("suffix", ["", "-accumulate4"])
def test_weights_are_those_of_ddp(found: dict[str, dict[str, Any]], name: str, suffix: str) -> None:
    assert_weights_of_ddp(found[name + suffix], found["ddp" + suffix])


@pytest.mark.parametrize("name", ["zero1", "zero2"])
def test_the_engine_makes_few_python_calls_for_each_tensor(found: dict[str, dict[str, Any]], name: str) -> None:
    more = found[name]["python"] - found["ddp"]["python"]
    assert more <= 20 * found[name]["tensors"]


def test_stage_3_makes_half_of_the_python_calls_of_deepspeeds_hooks(found: dict[str, dict[str, Any]]) -> None:
    ddp = found["ddp"]["python"]
    assert found["zero3"]["python"] - ddp < 0.5 * (found["zero3-deepspeeds-hooks"]["python"] - ddp)
