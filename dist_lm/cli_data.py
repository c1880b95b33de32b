"""The verbs about data: `dist-lm data ...` and `dist-lm tokenizer ...`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from dist_lm.cli_corpus import corpus_app, counter
from dist_lm.errors import ConfigError

data_app = typer.Typer(
    help="Collect, prepare, look at and verify data sets.\n\n"
    "dist-lm data prepare 'texts/*.jsonl' --tokenizer tokenizer --out data --seq-len 128\n\n"
    "dist-lm data inspect data/train --tokenizer tokenizer\n\n"
    "dist-lm data verify data/train",
    no_args_is_help=True,
)
tokenizer_app = typer.Typer(
    help="Train tokenizers.\n\n"
    "dist-lm tokenizer train corpus.jsonl --vocab-size 8000 --out tokenizer\n\n"
    "dist-lm tokenizer train corpus.jsonl --kind bpe --vocab-size 8000 --out gpt-tokenizer\n\n"
    "dist-lm tokenizer train 'dump/*.parquet' --field text=article --max-mb 500 --out tokenizer",
    no_args_is_help=True,
)
data_app.add_typer(corpus_app, name="corpus")

Inputs = Annotated[
    list[str],
    typer.Argument(
        help="Files, folders, patterns or URLs: txt, jsonl, csv, tsv, parquet, json, conll, webdataset tars, folders "
        "of `datasets`; also with .gz or .zst behind."
    ),
]
TokenizerOption = Annotated[Path, typer.Option("--tokenizer", help="Tokenizer folder.")]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="Format of all files, whatever their suffix; module:Class for one of your own."),
]
FieldOption = Annotated[
    list[str] | None,
    typer.Option("--field", metavar="OURS=THEIRS", help="Where the source has a field, such as text=article.body."),
]
DocumentsOption = Annotated[
    str, typer.Option("--documents", help="What a document of a .txt is: file, paragraph or line.")
]
ColumnsOption = Annotated[
    str | None, typer.Option("--columns", metavar="TOKEN,TAG", help="Columns of a CoNLL file, from 0; -1 is the last.")
]


@tokenizer_app.command("train")
def tokenizer_train(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens.")] = 30522,
    kind: Annotated[
        str, typer.Option(help="wordpiece (BERT), bpe (GPT, byte-level), t5 (the same with sentinels).")
    ] = "wordpiece",
    max_mb: Annotated[float, typer.Option(help="Train on a sample of this size; 0: on all.")] = 0.0,
    max_bad: Annotated[int, typer.Option(help="Bad records allowed.")] = 0,
    file_format: FormatOption = None,
    field: FieldOption = None,
    documents: DocumentsOption = "file",
) -> None:
    """Learn a vocabulary from text.

    dist-lm tokenizer train corpus.jsonl --vocab-size 8000 --out tokenizer

    dist-lm tokenizer train corpus.jsonl --kind bpe --vocab-size 8000 --out gpt-tokenizer

    dist-lm tokenizer train 'dump/*.parquet' --field text=article --max-mb 500 --out tokenizer
    """
    from dist_lm.data.sources.inputs import read_texts
    from dist_lm.data.tokenizer import train_tokenizer

    texts = read_texts(inputs, read_settings(file_format, field, documents, None), max_bad=max_bad)
    trained = train_tokenizer(texts, kind=kind, vocab_size=vocab_size, out=out, max_bytes=int(max_mb * 1e6) or None)
    print(f"{out}: {trained.vocab_size} tokens, sha256 {trained.sha256[:12]}")


@data_app.command("prepare")
def data_prepare(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="Folder to write: OUT/train and OUT/heldout.")],
    tokenizer: TokenizerOption,
    kind: Annotated[str, typer.Option(help="pairs (for mlm), tokens, classification, ...")] = "pairs",
    seq_len: Annotated[int, typer.Option(help="Tokens a row, special tokens included.")] = 128,
    heldout: Annotated[float, typer.Option(help="Share of the documents held out.")] = 0.02,
    file_format: FormatOption = None,
    field: FieldOption = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Option of the kind: labels=many.")
    ] = None,
    filters: Annotated[
        list[str] | None, typer.Option("--filter", metavar="NAME=VALUE", help="Drop texts: min_characters=200.")
    ] = None,
    documents: DocumentsOption = "file",
    columns: ColumnsOption = None,
    min_tokens: Annotated[int | None, typer.Option(help="Drop shorter rows; the kind has a default.")] = None,
    max_bad: Annotated[int, typer.Option(help="Bad records allowed.")] = 0,
    shard_rows: Annotated[int | None, typer.Option(help="Most rows of a shard; the kind has a default.")] = None,
    workers: Annotated[int, typer.Option(help="Processes; 0: one a core.")] = 0,
    ray: Annotated[bool, typer.Option("--ray", help="Tasks on the Ray cluster; all nodes must see OUT.")] = False,
    bucket_mb: Annotated[int, typer.Option(help="Text that one task of the second phase holds.")] = 64,
    seed: Annotated[int, typer.Option(help="Decides the shuffle and the split.")] = 0,
) -> None:
    """Clean, filter, drop duplicates, split, tokenise, shuffle, write shards.  Killed and run again,
    it goes on; run again after that, it does nothing.

    dist-lm data prepare corpus.jsonl --tokenizer tokenizer --out data --seq-len 128

    dist-lm data prepare reviews.csv --kind classification --field text=review --tokenizer bert --out reviews

    dist-lm data prepare 's3://bucket/*.parquet' --kind tokens --tokenizer gpt --ray --out /shared/data
    """
    from dist_lm.data.prepare import PrepareOptions, prepare

    options = PrepareOptions(
        inputs=inputs,
        out=out,
        tokenizer=tokenizer,
        kind=kind,
        seq_len=seq_len,
        heldout_fraction=heldout,
        settings=read_settings(file_format, field, documents, columns),
        kind_options={name: _json_value(value) for name, value in _pairs(option, "--option").items()},
        filters={name: _number(value, name) for name, value in _pairs(filters, "--filter").items()},
        min_tokens=min_tokens,
        max_bad=max_bad,
        shard_rows=shard_rows,
        workers=workers or None,
        ray=ray,
        bucket_bytes=bucket_mb << 20,
        seed=seed,
    )
    print(prepare(options, progress=counter()))


@data_app.command("records")
def data_records(
    inputs: Inputs,
    out: Annotated[Path, typer.Option(help="New .jsonl file.")],
    file_format: FormatOption = None,
    field: FieldOption = None,
    documents: DocumentsOption = "file",
    columns: ColumnsOption = None,
    max_bad: Annotated[int, typer.Option(help="Bad records allowed.")] = 0,
) -> None:
    """Any source as .jsonl, for predict and eval.

    dist-lm data records test.conll --out test.jsonl

    dist-lm data records dev-v2.0.json --out dev.jsonl

    dist-lm data records reviews.csv --field text=review --out reviews.jsonl
    """
    from dist_lm.data.convert import convert_records

    count, bad = convert_records(inputs, read_settings(file_format, field, documents, columns), out, max_bad=max_bad)
    print(f"{out}: {count} records" + (f", {bad} bad ones left out" if bad else ""))


@data_app.command("pair-lines")
def data_pair_lines(
    source: Annotated[str, typer.Argument(help="Text, a line an example; .gz is fine.")],
    target: Annotated[str, typer.Argument(help="Its translation, line by line.")],
    out: Annotated[Path, typer.Option(help="New .jsonl file of `source` and `target`.")],
    max_bad: Annotated[int, typer.Option(help="Bad pairs allowed.")] = 0,
) -> None:
    """Two files that run in parallel as records of a translation.

    dist-lm data pair-lines train.en train.de --out train.jsonl

    dist-lm data pair-lines train.en.gz train.de.gz --out train.jsonl

    dist-lm data pair-lines crawl.en crawl.de --out crawl.jsonl --max-bad 100
    """
    from dist_lm.data.convert import pair_lines

    count, bad = pair_lines(source, target, out, max_bad=max_bad)
    print(f"{out}: {count} pairs" + (f", {bad} bad ones left out" if bad else ""))


@data_app.command("inspect")
def data_inspect(
    folder: Annotated[str, typer.Argument(help="Prepared data set: a folder or a URL.")],
    tokenizer: TokenizerOption,
    show: Annotated[int, typer.Option(help="Rows to decode.")] = 3,
) -> None:
    """Decoded rows, lengths, counts.

    dist-lm data inspect data/train --tokenizer tokenizer

    dist-lm data inspect data/heldout --tokenizer tokenizer --show 10

    dist-lm data inspect s3://bucket/data/train --tokenizer tokenizer --show 1
    """
    from dist_lm.data.inspect import inspect_dataset

    print(inspect_dataset(folder, tokenizer, show=show))


@data_app.command("mixture")
def data_mixture(
    config: Annotated[Path, typer.Option("-c", "--config", help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, dotted.")] = None,
) -> None:
    """Sources of a run: their shares of the tokens and their epochs; starts nothing.

    dist-lm data mixture -c my.yaml

    dist-lm data mixture -c my.yaml run.steps=20000

    dist-lm data mixture -c recipe:bert-mini-docs batch.global=256
    """
    from dist_lm.assemble import open_training_set
    from dist_lm.config_files import load_config
    from dist_lm.data.mixture_report import mixture_report

    loaded = load_config(config, overrides or []).config
    data = open_training_set(loaded)
    print(mixture_report(data, steps=loaded.run.steps, global_rows=loaded.batch.global_rows))


@data_app.command("verify")
def data_verify(
    folder: Annotated[str, typer.Argument(help="Prepared data set: a folder or a URL.")],
    tokenizer: Annotated[Path | None, typer.Option(help="Also compare the tokenizer in this folder.")] = None,
) -> None:
    """Compare every shard with the manifest: counts, index, hashes.

    dist-lm data verify data/train

    dist-lm data verify data/train --tokenizer tokenizer

    dist-lm data verify s3://bucket/data/train
    """
    from dist_lm.data.location import redact
    from dist_lm.data.tokenizer import compare_tokenizer, load_tokenizer
    from dist_lm.data.verify import verify_dataset

    manifest = verify_dataset(folder)
    if tokenizer is not None:
        compare_tokenizer(manifest, load_tokenizer(tokenizer), folder=folder)
    print(f"ok: {redact(folder)}: {manifest.num_rows} rows in {len(manifest.shards)} shards")


@data_app.command("reshard")
def data_reshard(
    source: Annotated[str, typer.Argument(help="Prepared data set: a folder or a URL.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    shard_rows: Annotated[int | None, typer.Option(help="Rows of a shard; tokens, for kind tokens.")] = None,
    shards: Annotated[int | None, typer.Option(help="Number of shards.")] = None,
    block_rows: Annotated[int | None, typer.Option(help="Rows of a block; left out: as before.")] = None,
) -> None:
    """The same rows in the same order in shards of another size or number, compared after writing.

    dist-lm data reshard data/train --out data-64/train --shards 64

    dist-lm data reshard data/train --out large/train --shard-rows 100000

    dist-lm data reshard data/train --out fine/train --shards 256 --block-rows 64
    """
    from dist_lm.data.reshard import ReshardOptions, reshard

    made = reshard(ReshardOptions(source, out, shard_rows, shards, block_rows), progress=counter())
    print(f"{out}: {made.num_rows} rows in {len(made.shards)} shards, the same as in the source")


def read_settings(file_format: str | None, field: list[str] | None, documents: str, columns: str | None) -> Any:
    """ReadSettings of the command line."""
    from dist_lm.data.sources.format import ReadSettings
    from dist_lm.data.sources.registry import check_settings

    settings: dict[str, Any] = {"format": file_format, "fields": _pairs(field, "--field"), "text_documents": documents}
    if columns is not None:
        try:
            settings["tokens_column"], settings["tags_column"] = map(int, columns.split(","))
        except ValueError:
            raise ConfigError(f"`{columns}` are no two columns", where="--columns", do="Write 0,-1.") from None
    found = ReadSettings(**settings)
    check_settings(found)
    return found


def _pairs(given: list[str] | None, flag: str) -> dict[str, str]:
    pairs = {}
    for word in given or []:
        name, equals, value = word.partition("=")
        if not (name and equals and value):
            raise ConfigError(f"`{word}` is no pair", where=flag, do=f"Write {flag} name=value.")
        pairs[name] = value
    return pairs


def _number(value: str, name: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise ConfigError(f"{name}: `{value}` is no number", where="--filter", do="Write a number.") from None


def _json_value(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value
