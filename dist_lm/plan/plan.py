"""What a run will need and cost, before it is started.

Enters: a configuration whose data is prepared, a number of devices and their kind.  Leaves: a Plan:
memory by ZeRO stage, the stage that fits, time of a step, days, cost, checkpoints, goodput.
Promises: activations and FLOPs are those of the run's own code (trace.py) on its longest micro-batch;
what is assumed and not computed is listed in `assumptions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dist_lm.accelerators import Accelerator
from dist_lm.assemble import open_training_set
from dist_lm.batches import LocalBatches
from dist_lm.config import ModelSection, RunConfig
from dist_lm.data.stream import Stream
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.deepspeed_config import resolve
from dist_lm.driven import reduces_itself
from dist_lm.memory import chosen_micro_rows
from dist_lm.mesh import Mesh
from dist_lm.plan.fitting import HEADROOM, Need
from dist_lm.plan.fitting import options as options_that_fit
from dist_lm.plan.goodput import GPU_MTBF_HOURS, Costs, best_interval_s, expected, faults_at, simulate
from dist_lm.plan.states import States, states
from dist_lm.plan.trace import MicroStep, introduce, trace
from dist_lm.plan.traffic import Topology, traffic
from dist_lm.run_dir import RunDir
from dist_lm.schedule import BatchPlan
from dist_lm.tasks.base import MicroBatch, Task
from dist_lm.tasks.registry import build_task

GIB = 2**30
CONTEXT_GIB = 1.5
"""CUDA's context and NCCL's buffers."""
_SNAPSHOT_BYTES_S = 10e9
"""Copy of the states to host memory, a rank."""
_STEPS_SEEN = 8
STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Machine:
    """The devices of a run."""

    ranks: int
    device: Accelerator | None
    """None: CPU ranks."""
    memory_gib: float
    """Of a rank."""
    base_gib: float
    """That is taken before there is a model."""
    flops: float
    """Peak of a rank in the run's precision; 0: unknown."""
    topology: Topology
    update_s: float = 0.0
    """Of a step, for what does not grow with its rows; 0: it was not measured."""


@dataclass(frozen=True)
class Options:
    """What a plan assumes."""

    mfu: float = 0.4
    price_per_hour: float = 0.0
    mtbf_hours: float = GPU_MTBF_HOURS
    """Of one device."""
    restart_s: float = 120.0
    storage_gb_s: float = 2.0
    """Of the whole run, to where checkpoints go."""
    simulate: bool = False


@dataclass(frozen=True)
class StagePlan:
    """Memory and time of one ZeRO stage."""

    stage: int
    states_gib: float
    activations_gib: float
    buffers_gib: float
    total_gib: float
    host_gib: float
    fits: bool
    wire_gib: float
    compute_s: float
    update_s: float
    communication_s: float

    @property
    def step_s(self) -> float:
        """0: nobody knows the rate of the device."""
        return self.compute_s + self.update_s + self.communication_s if self.compute_s else 0.0


@dataclass(frozen=True)
class Plan:
    """Everything that `dist-lm plan` says."""

    parameters: int
    frozen: int
    ranks: int
    micro_rows: int
    micro_steps: int
    tokens_a_step: int
    flops_a_step: float
    """Of all ranks."""
    flops_a_token: float
    padding: float
    memory_gib: float
    stages: list[StagePlan]
    configured: int
    chosen: int
    """Lowest stage that fits; -1: none does."""
    advice: list[str] = field(default_factory=list)
    run: dict[str, float] = field(default_factory=dict)
    assumptions: list[str] = field(default_factory=list)

    def stage(self, number: int) -> StagePlan:
        return self.stages[number]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Work:
    """One rank's part of a step, on average; the longest micro-batch of some."""

    task: Task
    model: ModelSection
    batch: BatchPlan
    longest: MicroBatch
    slots: int
    tokens: int


def make_plan(config: RunConfig, machine: Machine, options: Options) -> Plan:
    """Raises ConfigError or DataError as a run would, and ConfigError where no stage fits."""
    work = _work(config, machine.ranks)
    on_gpu = machine.device is not None
    parts = config.sequence_parallel_size
    step = trace(work.task, work.model, work.longest, precision=config.precision, on_gpu=on_gpu, parts=parts)
    zero, configured = _zero_block(config, machine.ranks, work.batch)
    stages = [_stage_plan(stage, step, work, machine, options, config, zero) for stage in STAGES]
    fitting = [plan.stage for plan in stages if plan.fits]
    advice = []
    if not stages[configured].fits:
        advice = list(_advice(config, machine, work, step, zero, fitting, stages))
    chosen = configured if stages[configured].fits else min(fitting, default=-1)
    flops = step.flops * work.slots / step.slots * machine.ranks
    tokens = work.tokens * machine.ranks
    plan = Plan(
        parameters=step.parameters,
        frozen=step.frozen,
        ranks=machine.ranks,
        micro_rows=work.batch.rows_per_micro,
        micro_steps=work.batch.micro_steps,
        tokens_a_step=tokens,
        flops_a_step=flops,
        flops_a_token=flops / tokens,
        padding=1 - work.tokens / work.slots,
        memory_gib=machine.memory_gib,
        stages=stages,
        configured=configured,
        chosen=chosen,
        advice=advice,
        assumptions=_assumptions(machine, options),
    )
    return replace(plan, run=_whole_run(plan, config, machine, options)) if chosen >= 0 else plan


def _work(config: RunConfig, ranks: int) -> _Work:
    """The first rank's part of the first steps, from the data itself."""
    micro_rows = chosen_micro_rows(config, RunDir(config.run.dir))
    mesh = Mesh.of(0, ranks, config.sequence_parallel_size)
    batch = BatchPlan.divide(config.batch.global_rows, micro_rows, mesh.data_world_size)
    data = open_training_set(config)
    task = build_task(config.task, load_tokenizer(config.data.tokenizer), data.view, config.run.seed)
    model = introduce(task, config.model)
    columns = task.partner_columns
    stream = Stream(
        data, global_rows=config.batch.global_rows, rank=0, world_size=mesh.data_world_size, partner_columns=columns
    )
    with LocalBatches(stream, task, batch, mesh) as batches:
        steps = [batches.next(lambda: False) for _ in range(_STEPS_SEEN)]
    for local in steps:
        if local.failure is not None:
            raise local.failure
    micro_batches = [each for local in steps for each in local.micro_batches]
    longest = max(micro_batches, key=lambda micro_batch: micro_batch.slots)
    slots, tokens = (sum(getattr(each, name) for each in micro_batches) for name in ("slots", "tokens"))
    return _Work(task, model, batch, longest, slots // _STEPS_SEEN, tokens // _STEPS_SEEN)


def _zero_block(config: RunConfig, ranks: int, batch: BatchPlan) -> tuple[dict[str, Any], int]:
    """zero_optimization as the run would have it, and its stage."""
    resolved = resolve(
        config,
        world_size=ranks,
        micro_rows=batch.rows_per_micro,
        micro_steps=batch.micro_steps,
        hidden_size=None,
    )
    zero: dict[str, Any] = resolved.settings["zero_optimization"]
    return zero, int(zero["stage"])


def _stage_plan(
    stage: int,
    step: MicroStep,
    work: _Work,
    machine: Machine,
    options: Options,
    config: RunConfig,
    zero: dict[str, Any],
) -> StagePlan:
    held = _states(stage, step, work, machine, config, zero)
    total = held.peak(stage, step.activation_bytes, step.peak_with_gradients)
    width = 4 if config.precision == "fp32" else 2
    sent = traffic(
        (step.parameters + step.frozen) * width,
        stage=stage,
        ranks=machine.ranks,
        micro_steps=work.batch.micro_steps,
        gathers=step.modules,
    )
    passes = 3 if config.model.activation_checkpointing else 2
    sent = sent.beside(
        step.exchanged * work.slots * width * passes,
        calls=step.exchanges * passes * work.batch.micro_steps * config.sequence_parallel_size / machine.ranks,
    )
    compute_s = step.flops * work.slots / step.slots / (machine.flops * options.mfu) if machine.flops else 0.0
    total_gib = total / GIB + machine.base_gib
    return StagePlan(
        stage=stage,
        states_gib=(held.between_steps + held.gradients) / GIB,
        activations_gib=step.activation_bytes / GIB,
        buffers_gib=(max(held.buffers, held.reduction) + held.gathered) / GIB + machine.base_gib,
        total_gib=total_gib,
        host_gib=held.host / GIB,
        fits=total_gib <= machine.memory_gib * HEADROOM,
        wire_gib=sent.wire_bytes / GIB,
        compute_s=compute_s,
        update_s=machine.update_s,
        communication_s=sent.seconds(machine.topology, compute_s),
    )


def _states(
    stage: int, step: MicroStep, work: _Work, machine: Machine, config: RunConfig, zero: dict[str, Any]
) -> States:
    own_reduction = reduces_itself(
        {"zero_optimization": {**zero, "stage": stage}, "fp16": {"enabled": config.precision == "fp16"}}
    )
    return states(
        step.parameters,
        step.frozen,
        stage=stage,
        ranks=machine.ranks,
        precision=config.precision,
        micro_steps=work.batch.micro_steps,
        zero=zero,
        own_reduction=own_reduction,
        on_gpu=machine.device is not None,
    )


def _advice(
    config: RunConfig,
    machine: Machine,
    work: _Work,
    step: MicroStep,
    zero: dict[str, Any],
    fitting: Sequence[int],
    stages: Sequence[StagePlan],
) -> list[str]:
    """What would make the run fit, the cheapest first."""
    if fitting:
        return [f"zero={min(fitting)}"]
    recomputed = None
    if not config.model.activation_checkpointing:
        section = work.model.model_copy(update={"activation_checkpointing": True})
        on_gpu = machine.device is not None
        parts = config.sequence_parallel_size
        less = trace(work.task, section, work.longest, precision=config.precision, on_gpu=on_gpu, parts=parts)
        recomputed = less.activation_bytes / GIB

    def total_on(ranks: int) -> float:
        held = _states(3, step, work, replace(machine, ranks=ranks), config, zero)
        return held.peak(3, step.activation_bytes, step.peak_with_gradients) / GIB + machine.base_gib

    need = Need(
        total=stages[3].total_gib,
        there=machine.memory_gib,
        ranks=machine.ranks,
        rows=work.batch.rows_per_micro,
        activations=stages[3].activations_gib,
        recomputed=recomputed,
        optimizer=_states(3, step, work, machine, config, zero).optimizer / GIB,
        total_on=total_on,
    )
    return options_that_fit(need)


def _whole_run(plan: Plan, config: RunConfig, machine: Machine, options: Options) -> dict[str, float]:
    stage = plan.stage(plan.chosen)
    checkpoint = plan.parameters * 12.0
    mtbf_s = options.mtbf_hours * 3600 / machine.ranks
    costs = Costs(
        stall_s=checkpoint / machine.ranks / _SNAPSHOT_BYTES_S,
        write_s=checkpoint / (options.storage_gb_s * 1e9),
        restart_s=options.restart_s,
    )
    interval_s = best_interval_s(costs, mtbf_s)
    found = {
        "checkpoint_gb": checkpoint / 1e9,
        "checkpoints_kept_gb": checkpoint / 1e9 * config.run.keep,
        "faults_a_day": 86400 / mtbf_s,
        "save_every_s": interval_s,
        "goodput": expected(costs, mtbf_s, interval_s),
    }
    if not stage.step_s:
        return found
    work_s = stage.step_s * config.run.steps
    found |= {
        "step_s": stage.step_s,
        "tokens_s": plan.tokens_a_step / stage.step_s,
        "mfu": plan.flops_a_step / plan.ranks / stage.step_s / machine.flops,
        "save_every_steps": max(1.0, round(interval_s / stage.step_s)),
        "days": work_s / found["goodput"] / 86400,
    }
    found["device_hours"] = found["days"] * 24 * plan.ranks
    if options.price_per_hour:
        found["cost"] = found["device_hours"] * options.price_per_hour
    if options.simulate:
        shares = sorted(
            simulate(faults_at(seed, mtbf_s), costs, interval_s, max(work_s, 20 * mtbf_s)) for seed in range(20)
        )
        found |= {"goodput_simulated": sum(shares) / len(shares), "goodput_worst_of_20": shares[0]}
    return found


def _assumptions(machine: Machine, options: Options) -> list[str]:
    said = [f"{HEADROOM:.0%} of the memory may be filled", f"one fault in {options.mtbf_hours:,.0f} device-hours"]
    said.append(f"{options.restart_s:.0f} s from a fault to the next step")
    said.append(f"checkpoints are written at {options.storage_gb_s:g} GB/s")
    if machine.flops:
        said.append(f"{options.mfu:.0%} of {machine.flops / 1e12:.1f} TFLOP/s while computing")
    if machine.ranks > 1 and machine.device is not None:
        said.append(f"{machine.topology.gb_s:g} GB/s a device in collectives")
    return said
