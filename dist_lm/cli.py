"""Every verb of `dist-lm`.

Enters: a command line.  Leaves: an exit code (README, exit codes).
Promises: heavy libraries are imported inside the verbs that need them, so that --help is quick.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from dist_lm import cli_cluster, cli_model, cli_plan, cli_setup, garbage
from dist_lm.cli_data import data_app, tokenizer_app
from dist_lm.cli_runs import add_verbs
from dist_lm.errors import EXIT_DONE, DistLMError

app = typer.Typer(
    name="dist-lm",
    help="From raw text and machines to a Hugging Face language model.\n\n"
    "dist-lm demo --out demo\n\n"
    "dist-lm train -c recipe:bert-mini-docs --cpu 2\n\n"
    "dist-lm export runs/mine --out model",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(
    help="Show, check and describe configurations.\n\n"
    "dist-lm config check -c my.yaml --ranks 8\n\n"
    "dist-lm config show -c my.yaml optim.lr=1e-4\n\n"
    "dist-lm config schema > schema.json",
    no_args_is_help=True,
)
ops_app = typer.Typer(
    help="DeepSpeed's compiled ops: built once, before a run has to wait for them.\n\n"
    "dist-lm ops build\n\n"
    "TORCH_EXTENSIONS_DIR=/shared/ops dist-lm ops build\n\n"
    "CXX=g++-12 dist-lm ops build",
    no_args_is_help=True,
)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(ops_app, name="ops")
app.add_typer(cli_model.app)
cli_cluster.add_verbs(app)
app.command()(cli_plan.plan)
cli_setup.add_verbs(app)
add_verbs(app)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as optim.lr=1e-4.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `dist-lm`, `python -m dist_lm` and launch/*.py."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # `deepspeed` puts --local_rank=N before everything; LOCAL_RANK says the same.
    given = [word for word in given if not word.startswith(("--local_rank=", "--local-rank="))]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("dist_lm").setLevel(logging.INFO)
    garbage.collect_seldom()
    try:
        app(args=given, standalone_mode=True)
    except DistLMError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
    finally:
        garbage.keep_all()
    sys.exit(EXIT_DONE)


@app.command()
def train(
    config: ConfigOption,
    overrides: Overrides = None,
    cpu: Annotated[int, typer.Option(help="CPU-gloo mode with this many ranks.")] = 0,
    ray: Annotated[bool, typer.Option("--ray", help="Run on the Ray cluster that this process reaches.")] = False,
    max_restarts: Annotated[int, typer.Option(help="Restarts after a crash.")] = 3,
) -> None:
    """Pretrain or fine-tune: the task in the YAML decides.  The same command goes on where it was.

    dist-lm train -c recipe:bert-mini-docs --cpu 2

    dist-lm train -c my.yaml optim.lr=1e-4 run.dir=runs/try2

    dist-lm train -c my.yaml --ray run.dir=/shared/runs/x
    """
    from dist_lm.deepspeed_config import load_run
    from dist_lm.worker import launched_as_rank, run_rank

    given = overrides or []
    if launched_as_rank():
        sys.exit(run_rank(load_run(config, given), launcher=_launcher_name()))
    if ray:
        from dist_lm.cluster.ray_train import run_on_ray

        sys.exit(run_on_ray(config, given, max_restarts=max_restarts))
    loaded = load_run(config, given)
    from dist_lm.local_training import start

    sys.exit(start(loaded, config, given, cpu=cpu, max_restarts=max_restarts))


def _launcher_name() -> str:
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "deepspeed"


@config_app.command("show")
def config_show(config: ConfigOption, overrides: Overrides = None) -> None:
    """Every value and where it comes from.

    dist-lm config show -c my.yaml

    dist-lm config show -c my.yaml optim.lr=1e-4

    dist-lm config show -c recipe:bert-mini-docs
    """
    from dist_lm.config_files import show
    from dist_lm.deepspeed_config import load_run

    print(show(load_run(config, overrides or [])))


@config_app.command("check")
def config_check(
    config: ConfigOption,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(help="Number of ranks to check the batch for; 0: as few as can be.")] = 0,
) -> None:
    """Say whether the configuration and its DeepSpeed file hold together; starts nothing.

    dist-lm config check -c my.yaml

    dist-lm config check -c my.yaml --ranks 8

    dist-lm config check -c recipe:bert-mini-docs batch.global=512 --ranks 64
    """
    from dist_lm.deepspeed_config import load_run, resolve
    from dist_lm.memory import chosen_micro_rows
    from dist_lm.mesh import Mesh, check_heads
    from dist_lm.run_dir import RunDir
    from dist_lm.schedule import BatchPlan

    loaded = load_run(config, overrides or [])
    micro_rows = chosen_micro_rows(loaded.config, RunDir(loaded.config.run.dir))
    check_heads(loaded.config)
    ranks = ranks or loaded.config.sequence_parallel_size
    mesh = Mesh.of(0, ranks, loaded.config.sequence_parallel_size)
    plan = BatchPlan.divide(loaded.config.batch.global_rows, micro_rows, mesh.data_world_size)
    resolved = resolve(
        loaded.config,
        world_size=ranks,
        micro_rows=plan.rows_per_micro,
        micro_steps=plan.micro_steps,
        hidden_size=None,
        source_of=loaded.origins,
    )
    for note in resolved.notes:
        print(note)
    print(f"ok: {config}, {ranks} ranks x {plan.micro_steps} micro-steps x {plan.rows_per_micro} rows")


@config_app.command("schema")
def config_schema() -> None:
    """JSON schema of the YAML, for editors.

    dist-lm config schema

    dist-lm config schema > schema.json

    dist-lm config schema | python -m json.tool --sort-keys
    """
    import json

    from dist_lm.config_files import schema

    print(json.dumps(schema(), indent=2))


@ops_app.command("build")
def ops_build() -> None:
    """Build DeepSpeed's CPU op now, so that no run waits for it.

    dist-lm ops build

    TORCH_EXTENSIONS_DIR=/shared/ops dist-lm ops build

    CXX=g++-12 dist-lm ops build
    """
    from dist_lm import ops

    ops.build_cpu_op()
    print(f"ok: {ops.CPU_OP} in {ops.extensions_folder()}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
) -> None:
    """The whole path on text that every machine has: tokenizer, shards, pretraining with a killed
    rank, fine-tuning, export, predictions.  About five minutes on two cores.

    dist-lm demo

    dist-lm demo --out demo

    dist-lm demo --out tries/demo
    """
    from dist_lm.demo import run_demo

    run_demo(out)
