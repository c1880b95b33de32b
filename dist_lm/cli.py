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
from typing import Annotated, Any, NoReturn

import typer

from dist_lm.cli_cluster import cluster_app
from dist_lm.errors import EXIT_DONE, ConfigError, DistLMError

app = typer.Typer(
    name="dist-lm",
    help="From raw text and machines to a Hugging Face language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Show, check and describe configurations.", no_args_is_help=True)
data_app = typer.Typer(help="Collect, prepare, look at and verify data sets.", no_args_is_help=True)
corpus_app = typer.Typer(help="Corpora that every machine has.", no_args_is_help=True)
tokenizer_app = typer.Typer(help="Train tokenizers.", no_args_is_help=True)
ops_app = typer.Typer(help="DeepSpeed's compiled ops.", no_args_is_help=True)
app.add_typer(config_app, name="config")
app.add_typer(data_app, name="data")
data_app.add_typer(corpus_app, name="corpus")
app.add_typer(tokenizer_app, name="tokenizer")
app.add_typer(ops_app, name="ops")
app.add_typer(cluster_app, name="cluster")

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as optim.lr=1e-4.")]
_PROGRESS_S = 3.0
TokenizerOption = Annotated[Path, typer.Option("--tokenizer", help="Tokenizer folder.")]


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `dist-lm`, `python -m dist_lm` and launch/*.py."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    # `deepspeed` puts --local_rank=N before everything; LOCAL_RANK says the same.
    given = [word for word in given if not word.startswith(("--local_rank=", "--local-rank="))]
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("dist_lm").setLevel(logging.INFO)
    try:
        app(args=given, standalone_mode=True)
    except DistLMError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)
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

    dist-lm train -c launch/recipes/demo-pretrain.yaml --cpu 2

    dist-lm train -c my.yaml optim.lr=1e-4 run.dir=runs/try2
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
    from dist_lm.cluster.local import LocalLaunch, launch

    num_ranks = cpu or _visible_gpus()
    plan = LocalLaunch(["-c", str(config), *given], num_ranks, bool(cpu), max_restarts, loaded.config.run.dir)
    sys.exit(launch(plan))


def _launcher_name() -> str:
    if "DIST_LM_LAUNCHER" in os.environ:
        return os.environ["DIST_LM_LAUNCHER"]
    return "torchrun" if "TORCHELASTIC_RUN_ID" in os.environ else "deepspeed"


def _visible_gpus() -> int:
    import torch

    count = torch.cuda.device_count()
    if not count:
        raise ConfigError(
            "no GPU is visible, and no number of CPU ranks was given",
            do="Add --cpu 2 to train with two processes on the CPU.",
        )
    return count


@config_app.command("show")
def config_show(config: ConfigOption, overrides: Overrides = None) -> None:
    """Every value and where it comes from.

    dist-lm config show -c my.yaml optim.lr=1e-4
    """
    from dist_lm.config_files import show
    from dist_lm.deepspeed_config import load_run

    print(show(load_run(config, overrides or [])))


@config_app.command("check")
def config_check(
    config: ConfigOption,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(help="Number of ranks to check the batch for.")] = 1,
) -> None:
    """Say whether the configuration and its DeepSpeed file hold together; starts nothing.

    dist-lm config check -c my.yaml --ranks 8
    """
    from dist_lm.deepspeed_config import load_run, resolve
    from dist_lm.schedule import BatchPlan

    loaded = load_run(config, overrides or [])
    batch = loaded.config.batch
    plan = BatchPlan.divide(batch.global_rows, batch.micro_rows, ranks)
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
    """JSON schema of the YAML, for editors."""
    import json

    from dist_lm.config_files import schema

    print(json.dumps(schema(), indent=2))


@corpus_app.command("docs")
def corpus_docs(
    out: Annotated[Path, typer.Option(help="File to write, such as corpus.jsonl.")],
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    limit_mb: Annotated[float, typer.Option(help="Stop after this much text; 0: take all.")] = 0.0,
) -> None:
    """Docstrings of the standard library and the installed packages, labelled by package.

    dist-lm data corpus docs --out corpus.jsonl
    """
    from dist_lm.data.corpus_docs import write_docs_corpus

    report = write_docs_corpus(out, workers=workers, limit_mb=limit_mb or None, progress=_counter())
    print("\n".join([f"{out}:", *report.lines()]))


@corpus_app.command("packages")
def corpus_packages(
    corpus: Annotated[Path, typer.Argument(help="File of `data corpus docs`.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    packages: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    per_package: Annotated[int, typer.Option(help="Texts of each class.")] = 400,
) -> None:
    """A classification task: which package is a docstring about?

    dist-lm data corpus packages corpus.jsonl --out packages.jsonl
    """
    from dist_lm.data.package_task import write_package_task

    counts = write_package_task(corpus, out, packages=packages, per_package=per_package)
    print(f"{out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def _counter() -> Any:
    """Progress of long stages: a line every few seconds, so that logs stay readable."""
    import time

    told_at = time.monotonic()

    def tell(stage: str, done: int, total: int | None) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > _PROGRESS_S:
            told_at = time.monotonic()
            print(f"{stage}: {done}" + (f" of {total}" if total else ""), flush=True)

    return tell


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders or globs of .txt and .jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens.")] = 30522,
    kind: Annotated[
        str, typer.Option(help="wordpiece (BERT), bpe (GPT, byte-level), t5 (the same with sentinels).")
    ] = "wordpiece",
    text_field: Annotated[str, typer.Option(help="Field of a jsonl record.")] = "text",
    max_mb: Annotated[float, typer.Option(help="Train on a sample of this size; 0: on all.")] = 0.0,
) -> None:
    """Learn a vocabulary from text.

    dist-lm tokenizer train corpus.jsonl --vocab-size 8000 --out tokenizer

    dist-lm tokenizer train corpus.jsonl --kind bpe --vocab-size 8000 --out gpt-tokenizer
    """
    from dist_lm.data.sources import read_records
    from dist_lm.data.tokenizer import train_tokenizer

    texts = (record.text for record in read_records(inputs, text_field=text_field))
    trained = train_tokenizer(texts, kind=kind, vocab_size=vocab_size, out=out, max_bytes=int(max_mb * 1e6) or None)
    print(f"{out}: {trained.vocab_size} tokens, sha256 {trained.sha256[:12]}")


@data_app.command("prepare")
def data_prepare(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders or globs of .txt and .jsonl.")],
    out: Annotated[Path, typer.Option(help="Folder to write: OUT/train and OUT/heldout.")],
    tokenizer: TokenizerOption,
    kind: Annotated[str, typer.Option(help="pairs (for mlm) or classification.")] = "pairs",
    seq_len: Annotated[int, typer.Option(help="Tokens a row, special tokens included.")] = 128,
    heldout: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.02,
    text_field: Annotated[str, typer.Option(help="Field of a jsonl record.")] = "text",
    label_field: Annotated[str, typer.Option(help="Field with the label (classification).")] = "label",
    max_bad: Annotated[int, typer.Option(help="Bad records allowed.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Decides the shuffle and the split.")] = 0,
) -> None:
    """Tokenise, split, shuffle, write shards.  Run again, it does nothing that is done.

    dist-lm data prepare corpus.jsonl --tokenizer tokenizer --out data --seq-len 128

    dist-lm data prepare reviews.jsonl --kind classification --tokenizer tokenizer --out data
    """
    from dist_lm.data.prepare import PrepareOptions, prepare

    options: dict[str, Any] = {
        "inputs": inputs,
        "out": out,
        "tokenizer": tokenizer,
        "kind": kind,
        "seq_len": seq_len,
        "heldout_fraction": heldout,
        "text_field": text_field,
        "label_field": label_field,
        "max_bad": max_bad,
        "workers": workers,
        "seed": seed,
    }
    print(prepare(PrepareOptions(**options), progress=_counter()))


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[Path, typer.Argument(help="Prepared data set.")],
    tokenizer: TokenizerOption,
    show: Annotated[int, typer.Option(help="Rows to decode.")] = 3,
) -> None:
    """Decoded rows, lengths, counts.

    dist-lm data inspect data/train --tokenizer tokenizer
    """
    from dist_lm.data.inspect import inspect_dataset

    print(inspect_dataset(folder, tokenizer, show=show))


@data_app.command("verify")
def data_verify(folder: Annotated[Path, typer.Argument(help="Prepared data set.")]) -> None:
    """Compare every shard with the manifest: counts, index, hashes.

    dist-lm data verify data/train
    """
    from dist_lm.data.shards import verify_dataset

    manifest = verify_dataset(folder)
    print(f"ok: {folder}: {manifest.num_rows} rows in {len(manifest.shards)} shards")


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="Run folder, or RUN@STEP.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
) -> None:
    """Write an ordinary Hugging Face folder, and check it by loading it again.

    dist-lm export runs/demo --out model

    dist-lm export runs/demo@1000 --out model-1000
    """
    from dist_lm.worker import prepare_environment

    prepare_environment()
    from dist_lm.export import export as export_run

    folder, _, step = run.partition("@")
    if step and not step.isdecimal():
        raise ConfigError(f"{run}: `{step}` is not a step", do="Write RUN@1000.")
    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype {dtype} is unknown", do="Write fp32 or bf16.")
    done = export_run(Path(folder), out, step=int(step) if step else None, dtype=dtype)
    print(
        f"{done.folder}: {done.architecture}, {done.num_parameters:,} parameters of step {done.step}; "
        f"reloaded, largest logit difference {done.largest_logit_difference:.3g}"
    )


@app.command()
def tb(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    port: Annotated[int, typer.Option(help="Port on this machine.")] = 6006,
) -> None:
    """Show a run in TensorBoard.

    dist-lm tb runs/demo
    """
    from dist_lm.run_dir import RunDir

    folder = RunDir(run).tensorboard
    if not folder.is_dir():
        raise ConfigError(f"{run} holds no TensorBoard files", do="Name a folder that `dist-lm train` wrote.")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    os.execv(sys.executable, command)


@ops_app.command("build")
def ops_build() -> None:
    """Build DeepSpeed's CPU op now, so that no run waits for it."""
    from dist_lm import ops

    ops.build_cpu_op()
    print(f"ok: {ops.CPU_OP} in {ops.extensions_folder()}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
) -> None:
    """The whole path on text that every machine has: tokenizer, shards, pretraining with a killed
    rank, fine-tuning, export, predictions.  About five minutes on two cores.

    dist-lm demo --out demo
    """
    from dist_lm.demo import run_demo

    run_demo(out)
