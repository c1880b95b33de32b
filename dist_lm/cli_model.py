"""Verbs about trained models: export, predict, eval.

Enters: a command line.  Leaves: files, and a few lines on the console.
Promises: heavy libraries are imported inside the verbs.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_lm.cli_data import ColumnsOption, DocumentsOption, FormatOption, read_settings
from dist_lm.errors import ConfigError

app = typer.Typer()

From = Annotated[str, typer.Option("--from", help="RUN, RUN@best, RUN@1000, or a Hugging Face folder.")]
Records = Annotated[str, typer.Option("--in", help="What `data prepare` reads: .jsonl, .csv, a URL, ...")]
TaskOption = Annotated[str | None, typer.Option("--task", help="Refuse a model of another task.")]
FieldOption = Annotated[
    list[str] | None, typer.Option("--field", help="OURS=THEIRS, such as text=review.  Repeatable.")
]
MaxBad = Annotated[int, typer.Option("--max-bad", help="Bad records allowed; they are counted and marked.")]
RanksOption = Annotated[int, typer.Option("--ranks", help="Processes that share the records.")]
BatchRows = Annotated[int, typer.Option("--batch", help="Rows of one forward pass.")]
SeqLen = Annotated[int | None, typer.Option("--seq-len", help="Tokens of a model input; else as trained.")]
Beams = Annotated[int, typer.Option("--beams", help="Beams of generation; 1: greedy.")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", help="Tokens generated at most.")]
NullThreshold = Annotated[
    float | None,
    typer.Option("--null-threshold", help="A question has no answer where that leads the best one by more."),
]


@app.command()
def export(
    run: Annotated[str, typer.Argument(help="RUN, RUN@best, RUN@latest or RUN@1000.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    max_shard_gb: Annotated[float, typer.Option(help="Largest file of weights, in GB.")] = 5.0,
    adapter: Annotated[bool, typer.Option("--adapter", help="The LoRA adapter alone, not merged.")] = False,
) -> None:
    """Write an ordinary Hugging Face folder, and check it by loading it again.

    dist-lm export runs/demo --out model

    dist-lm export runs/demo@1000 --out model-1000

    dist-lm export runs/demo@best --out best --dtype bf16
    """
    from dist_lm.worker import prepare_environment

    prepare_environment()
    from dist_lm.export import export as export_run
    from dist_lm.export import export_adapter

    if adapter:
        alone = export_adapter(run, out)
        print(f"{out}: adapter of {alone.architecture}, {alone.num_parameters:,} parameters of step {alone.step}")
        return
    if dtype not in ("fp32", "bf16"):
        raise ConfigError(f"--dtype {dtype} is unknown", do="Write fp32 or bf16.")
    done = export_run(run, out, dtype=dtype, max_shard_gb=max_shard_gb)
    print(
        f"{done.folder}: {done.architecture}, {done.num_parameters:,} parameters of step {done.step}; "
        f"reloaded, largest logit difference {done.largest_logit_difference:.3g}"
    )


@app.command()
def predict(
    model: From,
    records: Records,
    out: Annotated[Path, typer.Option(help="New .jsonl file: the records with their predictions.")],
    task: TaskOption = None,
    field: FieldOption = None,
    max_bad: MaxBad = 0,
    ranks: RanksOption = 1,
    file_format: FormatOption = None,
    documents: DocumentsOption = "line",
    columns: ColumnsOption = None,
    batch: BatchRows = 16,
    seq_len: SeqLen = None,
    top_k: Annotated[int, typer.Option(help="Guesses for a mask.")] = 5,
    beams: Beams = 1,
    max_new_tokens: MaxNewTokens = 64,
    n_best: Annotated[int, typer.Option(help="Answers to a question.")] = 5,
    null_threshold: NullThreshold = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Attributions of labels and entities, and a page of them beside OUT.")
    ] = False,
    prediction_field: Annotated[str, typer.Option(help="Field that the prediction goes into.")] = "prediction",
    ray: Annotated[
        bool, typer.Option("--ray", help="Tasks of a Ray cluster share the records; --ranks of them.")
    ] = False,
) -> None:
    """Labels, entities, answers, translations, guesses or continuations for every record.

    dist-lm predict --from runs/sst2 --in reviews.jsonl --out labelled.jsonl

    dist-lm predict --from model --in german.jsonl --out english.jsonl --beams 4 --ranks 2

    dist-lm predict --from runs/ner --in texts.csv --out entities.jsonl --explain
    """
    request = _request(
        model, records, task, field, max_bad, ranks, read_settings(file_format, None, documents, columns),
        ray=ray, batch_rows=batch, seq_len=seq_len, null_threshold=null_threshold, explain=explain,
        top_k=top_k, n_best=n_best, beams=beams, max_new_tokens=max_new_tokens,
    )  # fmt: skip
    from dist_lm.predict import predict_file

    count, bad = predict_file(request, out, prediction_field=prediction_field)
    print(f"{out}: {count} records" + (f", {bad} of them bad and marked" if bad else ""))


@app.command("eval")
def evaluate(
    model: From,
    records: Records,
    task: TaskOption = None,
    field: FieldOption = None,
    max_bad: MaxBad = 0,
    ranks: RanksOption = 1,
    file_format: FormatOption = None,
    documents: DocumentsOption = "line",
    columns: ColumnsOption = None,
    batch: BatchRows = 16,
    seq_len: SeqLen = None,
    beams: Beams = 1,
    max_new_tokens: MaxNewTokens = 64,
    null_threshold: NullThreshold = None,
    bleu_tokenize: Annotated[str, typer.Option(help="sacreBLEU's tokenizer: 13a, intl, char, zh.")] = "13a",
    slice_by: Annotated[list[str] | None, typer.Option(help="Figures for each value of a field.  Repeatable.")] = None,
    resamples: Annotated[int, typer.Option(help="Draws for the confidence intervals; 0: none.")] = 1000,
    seed: Annotated[int, typer.Option(help="Decides the draws.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON too.")] = None,
) -> None:
    """How good is a model on records that say what is expected, and for whom less so?

    dist-lm eval --from runs/ner@best --in test.jsonl --slice-by source --out figures.json

    dist-lm eval --from gpt2-folder --task causal_lm --in texts.jsonl

    dist-lm eval --from runs/translate --in test.csv --beams 4 --bleu-tokenize intl
    """
    request = _request(
        model, records, task, field, max_bad, ranks, read_settings(file_format, None, documents, columns),
        batch_rows=batch, seq_len=seq_len, null_threshold=null_threshold, beams=beams,
        max_new_tokens=max_new_tokens, bleu_tokenize=bleu_tokenize,
    )  # fmt: skip
    from dist_lm import disk
    from dist_lm.judge import Slicing, judge_file, report_lines

    report = judge_file(request, Slicing(tuple(slice_by or ()), resamples, seed))
    print("\n".join(report_lines(report)))
    if out is not None:
        disk.write_bytes(out, (json.dumps(report, indent=1) + "\n").encode())


def _request(
    model: str,
    records: str,
    task: str | None,
    renamed: list[str] | None,
    max_bad: int,
    ranks: int,
    reading: Any,
    ray: bool = False,
    **options: Any,
) -> Any:
    from dist_lm.worker import prepare_environment

    prepare_environment()
    _refuse_launchers()
    from dist_lm.predict import Request
    from dist_lm.predictors.base import PredictOptions

    for name, value in {"--ranks": ranks, "--batch": options["batch_rows"], "--beams": options["beams"]}.items():
        if value < 1:
            raise ConfigError(f"{name} {value} is too small", do="Write 1 or more.")
    return Request(
        model, records, PredictOptions(**options), task, _names(renamed or []), max_bad, ranks, ray=ray, reading=reading
    )


def _refuse_launchers() -> None:
    """ConfigError under torchrun or `deepspeed`, whose processes would each do the whole work."""
    started = os.environ.get("WORLD_SIZE", "1")
    if started != "1":
        raise ConfigError(
            f"predict and eval were started {started} times",
            where="WORLD_SIZE",
            why="They start their own processes, one a share of the records.",
            do="Start them once, without torchrun or deepspeed, with --ranks N; the processes share the GPUs.",
        )


def _names(renamed: list[str]) -> dict[str, str]:
    names = {}
    for pair in renamed:
        ours, equals, theirs = pair.partition("=")
        if not (ours and equals and theirs):
            raise ConfigError(f"--field {pair} names no two fields", do="Write OURS=THEIRS, such as text=review.")
        names[ours] = theirs
    return names
