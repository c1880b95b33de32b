"""A configuration and its data: does it hold together, and do the data sets fit it.

Enters: a configuration.  Leaves: findings.  Promises: manifests are read; every byte of the data only
where it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_lm.config import RunConfig
from dist_lm.data.location import redact
from dist_lm.doctor.finding import Finding, of_error, ok
from dist_lm.errors import DistLMError


def check_data(config: RunConfig) -> Iterator[Finding]:
    """Manifests, tokenizer, task and batch against each other, as the first rank of a run does it."""
    from dist_lm.assemble import check_heldout, open_training_set
    from dist_lm.data.tokenizer import compare_tokenizer, load_tokenizer
    from dist_lm.tasks.registry import build_task

    try:
        tokenizer = load_tokenizer(config.data.tokenizer)
        data = open_training_set(config)
        for source in data.sources:
            compare_tokenizer(source.view.manifest, tokenizer, folder=source.location)
        check_heldout(config, data, tokenizer)
        build_task(config.task, tokenizer, data.view, config.run.seed)
        data.refuse_larger_batch(config.batch.global_rows)
    except DistLMError as error:
        yield of_error("data", error)
        return
    epochs = config.run.steps * config.batch.global_rows / data.num_rows
    yield ok(
        "data",
        f"{data.num_rows:,} rows for {config.task.name}, tokenizer {tokenizer.sha256[:8]}; "
        f"{config.run.steps:,} steps are {epochs:.1f} epochs",
    )


def check_data_bytes(config: RunConfig) -> Iterator[Finding]:
    """Every byte of every data set against its manifest."""
    from dist_lm.data.verify import verify_dataset

    for location in config.data.locations:
        try:
            manifest = verify_dataset(location)
        except DistLMError as error:
            yield of_error("data", error)
        else:
            size = sum(entry.bytes for entry in manifest.shards)
            yield ok("data", f"{redact(location)}: {len(manifest.shards)} shards, {size / 1e6:.1f} MB verified")
