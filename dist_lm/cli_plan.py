"""The verb `plan`: what a run will need, before it is started.

Enters: a command line.  Leaves: a table, or JSON.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_lm.errors import ConfigError
from dist_lm.plan.baseline import EXACT_MALLOC
from dist_lm.plan.goodput import GPU_MTBF_HOURS

if TYPE_CHECKING:
    from dist_lm.plan.plan import Plan
    from dist_lm.plan.probe import Measured

ConfigOption = Annotated[Path, typer.Option("-c", "--config", help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value, dotted.")]


def plan(
    config: ConfigOption,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Devices, or CPU ranks.", min=1)] = 1,
    gpu: Annotated[str, typer.Option(help="h100, h200, a100, ... or cpu.")] = "cpu",
    mfu: Annotated[float, typer.Option(help="Share of the peak while computing.")] = 0.4,
    price: Annotated[float, typer.Option(help="Of a device and hour.")] = 0.0,
    mtbf_hours: Annotated[float, typer.Option(help="Hours between faults of one device.")] = GPU_MTBF_HOURS,
    restart_s: Annotated[float, typer.Option(help="Seconds from a fault to the next step.")] = 120.0,
    storage: Annotated[float, typer.Option(help="GB/s to where checkpoints go.")] = 2.0,
    simulate_faults: Annotated[bool, typer.Option("--simulate-faults", help="Goodput of 20 simulated runs.")] = False,
    probe: Annotated[int, typer.Option(help="Train so many steps on CPU ranks of this machine, and compare.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Memory by ZeRO stage, time, cost, checkpoints and goodput of a run; starts nothing.

    dist-lm plan -c my.yaml --gpus 64 --gpu h100 --price 2.5

    dist-lm plan -c my.yaml --gpus 1024 --gpu h100 --simulate-faults

    dist-lm plan -c my.yaml --gpus 2 --probe 6
    """
    from dist_lm.worker import prepare_environment

    prepare_environment()
    from dist_lm.deepspeed_config import load_run
    from dist_lm.plan.machine import machine_of
    from dist_lm.plan.plan import Options, make_plan
    from dist_lm.plan.probe import calibrated, measure

    if as_json:
        # What a task says of the model is for people.
        logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr, force=True)
    if not 0 < mfu <= 1:
        raise ConfigError(f"--mfu {mfu} is not a share", do="Write a number above 0, up to 1.")
    if probe and gpu != "cpu":
        raise ConfigError("--probe runs on CPU ranks", do="Leave out --gpu; on a GPU start the run with run.steps=20.")
    loaded = load_run(config, overrides or [])
    machine = machine_of(gpu, gpus, loaded.config.precision)
    options = Options(mfu, price, mtbf_hours, restart_s, storage, simulate_faults)
    planned = make_plan(loaded.config, machine, options)
    measured = None
    if probe:
        machine = calibrated(config, overrides or [], planned, machine, steps=probe)
        planned = make_plan(loaded.config, machine, replace(options, mfu=1.0))
        measured = measure(config, overrides or [], ranks=gpus, steps=probe)
    if as_json:
        print(json.dumps(planned.as_json() | ({"measured": measured.as_json()} if measured else {})))
    else:
        print(_text(planned, measured))


def _compared(name: str, planned: float, measured: float) -> str:
    return f"{name:12}{planned:10.3f}{measured:10.3f}{planned / measured:8.2f}"


def _text(planned: Plan, measured: Measured | None) -> str:
    lines = [
        f"{planned.parameters / 1e6:,.1f} M parameters trained"
        + (f", {planned.frozen / 1e6:,.1f} M frozen" if planned.frozen else ""),
        f"{planned.ranks} ranks x {planned.micro_steps} micro-steps x {planned.micro_rows} rows: "
        f"{planned.tokens_a_step:,} tokens a step, {planned.padding:.1%} padding",
        f"{planned.flops_a_token / 1e6:,.1f} MFLOP a token, {planned.flops_a_step / 1e12:,.2f} TFLOP a step",
        "",
        f"{'GiB a rank':12}{'states':>9}{'activations':>13}{'buffers':>9}{'total':>8}  of {planned.memory_gib:.1f}"
        f"{'sent a step':>14}{'step':>10}",
    ]
    for stage in planned.stages:
        mark = "<- configured" if stage.stage == planned.configured else ""
        time = f"{stage.step_s:9.3f}s" if stage.step_s else f"{'-':>10}"
        lines.append(
            f"zero {stage.stage:<7}{stage.states_gib:9.2f}{stage.activations_gib:13.2f}{stage.buffers_gib:9.2f}"
            f"{stage.total_gib:8.2f}  {'fits' if stage.fits else 'no':8}{stage.wire_gib:13.2f}{time}  {mark}"
        )
    lines += [f"does not fit; what would: {each}" for each in planned.advice]
    run = planned.run
    if "days" in run:
        cost = f", cost {run['cost']:,.0f}" if "cost" in run else ""
        lines += [
            "",
            f"{run['tokens_s']:,.0f} tokens/s, MFU {run['mfu']:.1%}; {run['days']:.2f} days, "
            f"{run['device_hours']:,.0f} device-hours{cost}",
        ]
    if run:
        every = f" ({run['save_every_steps']:,.0f} steps)" if "save_every_steps" in run else ""
        lines.append(
            f"checkpoint {run['checkpoint_gb']:.2f} GB; save every {run['save_every_s']:,.0f} s{every}; "
            f"{run['faults_a_day']:.3g} faults a day, goodput {run['goodput']:.1%}"
        )
    if "goodput_simulated" in run:
        lines.append(
            f"simulated: goodput {run['goodput_simulated']:.1%}, worst of 20 runs {run['goodput_worst_of_20']:.1%}"
        )
    if measured:
        stage = planned.stage(planned.configured)
        lines += [
            "",
            f"{'':12}{'planned':>10}{'measured':>10}{'ratio':>8}",
            _compared("memory, GiB", stage.total_gib, measured.memory_gib),
            _compared("step, s", stage.step_s, measured.step_s),
            f"memory is measured with {' '.join(f'{name}={value}' for name, value in EXACT_MALLOC.items())};",
            f"as it comes, glibc keeps freed memory for faster steps: {measured.held_gib:.2f} GiB",
        ]
    lines += ["", "assumed: " + "; ".join(planned.assumptions)]
    return "\n".join(lines)
