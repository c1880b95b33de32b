"""Text to shards: read, clean, filter, drop duplicates, split, tokenise, shuffle, write.

Enters: files of the user and a tokenizer.  Leaves: OUT/train and OUT/heldout, each a data set.
Promises: the same inputs and options give the same bytes, whatever the number of workers and however
often the work was killed; killed and run again it does only what is missing or does not verify; what
was dropped is counted with the reason.

Two phases of tasks with files between them (preparation/): each split of the input is packed and
grouped by bucket, then each bucket becomes shards.  The memory of a task does not grow with the input:

    map task     part_bytes x 2 + a batch of documents
    reduce task  bucket_bytes of text as tokens x 3 + shard_rows x (bytes of a padded row) x 2

and the largest document where it is larger than these.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import numpy as np
from numpy.typing import NDArray

from dist_lm.data.manifest import LABEL_COUNTS, MANIFEST_NAME, Manifest
from dist_lm.data.preparation.job import HELDOUT, TRAIN, Job, PartOfMap, WorkFolder
from dist_lm.data.preparation.map_task import BAD, READ, MapSummary, map_split
from dist_lm.data.preparation.plan import PrepareOptions, check_options, identity_of, plan_job
from dist_lm.data.preparation.reduce_task import Bucket, ReduceSummary, reduce_bucket
from dist_lm.data.preparation.runners import run_tasks
from dist_lm.data.process_pool import Progress, silent
from dist_lm.data.sources.inputs import list_inputs
from dist_lm.data.sources.record import EXAMPLES_SHOWN, BadRecords
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.verify import verify_dataset
from dist_lm.disk import disk_errors
from dist_lm.errors import ConfigError, DataError

__all__ = ["HELDOUT", "TRAIN", "PrepareOptions", "PrepareReport", "prepare"]

log = logging.getLogger(__name__)

_WORK_PREFIX, _LOCK = ".work-", ".prepare.lock"


@dataclass
class PrepareReport:
    """What was kept, dropped and why; rows and tokens by split."""

    up_to_date: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    splits: dict[str, dict[str, int]] = field(default_factory=dict)
    out: Path = Path()

    def __str__(self) -> str:
        lines = [f"{self.out} is up to date: verified, nothing to do"] if self.up_to_date else []
        lines += [
            f"{name:8} {facts['rows']} rows, {facts['tokens']} tokens, {facts['shards']} shards"
            for name, facts in self.splits.items()
        ]
        verbs = {"documents read": "read", "documents kept": "kept"}
        lines += [f"{verbs.get(name, 'dropped'):8} {count} {name}" for name, count in self.counts.items() if count]
        return "\n".join(lines)


def prepare(options: PrepareOptions, progress: Progress = silent) -> PrepareReport:
    """Make the data sets, or say that they are there.

    Raises DataError for unusable input, ConfigError where OUT holds something else, EnvironmentFault
    where the disk refuses.
    """
    check_options(options)
    tokenizer = load_tokenizer(options.tokenizer)
    files = list_inputs(options.inputs, options.settings)
    if options.ray:
        files = [file.absolute() for file in files]
    identity = identity_of(options, tokenizer, files, progress)
    with disk_errors(options.out):
        options.out.mkdir(parents=True, exist_ok=True)
    with _alone(options.out):
        # The plan may differ where the result does not, and then earlier parts are of no use.
        planned = {**identity, "split_bytes": options.split_bytes, "part_bytes": options.part_bytes}
        name = hashlib.sha256(json.dumps(planned, sort_keys=True).encode()).hexdigest()[:12]
        work = WorkFolder(options.out.absolute() / f"{_WORK_PREFIX}{name}")
        report, manifests = _finished(options, identity)
        if report is None:
            job = plan_job(options, tokenizer, files)
            report, manifests = _run(work, job, options, tokenizer, identity, progress)
        _clear_up(options.out, manifests)
    return report


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One preparation a folder: two would write the same files."""
    lock = filelock.FileLock(out / _LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ConfigError(
            "another preparation works in this folder", where=str(out), do="Wait for it, or choose another --out."
        ) from None
    try:
        yield
    finally:
        lock.release()


def _clear_up(out: Path, manifests: Mapping[str, Manifest]) -> None:
    """Remove the work folders, also of preparations that were given up, and the shards that those left."""
    for path in out.glob(f"{_WORK_PREFIX}*"):
        WorkFolder(path).remove()
    for name, manifest in manifests.items():
        listed = {shard.name for shard in manifest.shards} | {shard.index_name for shard in manifest.shards}
        with disk_errors(out / name, "remove a shard"):
            for path in (out / name).glob("s-??????.tar*"):
                if path.name not in listed:
                    path.unlink()


def _finished(options: PrepareOptions, identity: dict[str, Any]) -> tuple[PrepareReport | None, dict[str, Manifest]]:
    """A report if all is there and verified; None if there is work.  Refuses a folder of another identity."""
    names = [TRAIN] + ([HELDOUT] if options.heldout_fraction else [])
    found: dict[str, Manifest] = {}
    for name in names:
        folder = options.out / name
        if not (folder / MANIFEST_NAME).exists():
            continue
        manifest = Manifest.load(folder)
        _refuse_other(folder, manifest.preparation.get("identity", {}), identity)
        try:
            found[name] = verify_dataset(folder)
        except DataError as error:
            log.warning("%s is prepared again: %s (%s)", folder, error.what, error.where)
            (folder / MANIFEST_NAME).unlink()
    if len(found) < len(names):
        return None, found
    counts = found[TRAIN].preparation["counts"]
    splits = {name: _facts(manifest) for name, manifest in found.items()}
    return PrepareReport(True, counts, splits, options.out), found


def _by_name(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an identity, those of inner mappings as outer.inner."""
    flat: dict[str, Any] = {}
    for name, value in identity.items():
        flat |= {f"{name}.{inner}": one for inner, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _refuse_other(folder: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    before, now = _by_name(old), _by_name(new)
    changed = [
        f"{name}: {json.dumps(before.get(name))} -> {json.dumps(value)}"
        for name, value in now.items()
        if name not in before or before[name] != value
    ]
    if changed:
        raise ConfigError(
            "the folder holds a data set made of other inputs or with other options",
            where=str(folder),
            why="\n".join(line[:100] for line in changed[:4]),
            do="Choose another --out, or remove this folder.",
        )


def _run(
    work: WorkFolder,
    job: Job,
    options: PrepareOptions,
    tokenizer: Tokenizer,
    identity: dict[str, Any],
    progress: Progress,
) -> tuple[PrepareReport, dict[str, Manifest]]:
    job_path = work.write(job, options.tokenizer)
    mapped = _map(work, job, job_path, options, progress)
    buckets = _number_shards(job, mapped.bucket_rows)
    reduced = _reduce(partial(reduce_bucket, job_path, mapped.parts_path), job, options, buckets, progress)
    counts = mapped.counts
    for summary in reduced:
        counts.update(summary.counts)
    report = PrepareReport(counts=dict(counts), out=options.out)
    manifests = {}
    for name in job.names:
        mine = [done for bucket, done in zip(buckets, reduced, strict=True) if job.name_of(bucket.number) == name]
        shards = tuple(shard for summary in mine for shard in summary.shards)
        _expect_rows(name, shards, options, report)
        manifests[name] = Manifest(
            kind=job.kind_name,
            columns=job.kind.columns(job.rules),
            block_rows=job.block_rows,
            seq_len=job.rules.seq_len,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            num_rows=sum(shard.rows for shard in shards),
            num_tokens=sum(summary.num_tokens for summary in mine),
            shards=shards,
            labels=mapped.labels,
            facts=job.kind.facts(tokenizer, job.rules),
            preparation={
                "identity": identity,
                "counts": report.counts,
                LABEL_COUNTS: _label_counts(mapped.labels, mine),
            },
        )
    # The held-out set is published last: where it is, all is there.
    for name, manifest in manifests.items():
        manifest.save(options.out / name)
        report.splits[name] = _facts(manifest)
    return report, manifests


def _label_counts(labels: Sequence[str], summaries: Sequence[ReduceSummary]) -> dict[str, int]:
    return {
        label: sum(summary.label_counts.get(number, 0) for summary in summaries) for number, label in enumerate(labels)
    }


@dataclass
class _Mapped:
    """What the map phase tells."""

    counts: Counter[str]
    labels: tuple[str, ...]
    bucket_rows: NDArray[np.int64]
    parts_path: Path


def _map(work: WorkFolder, job: Job, job_path: Path, options: PrepareOptions, progress: Progress) -> _Mapped:
    bad = BadRecords(options.max_bad)
    counts: Counter[str] = Counter({READ: 0})
    bucket_rows = np.zeros(sum(job.num_buckets), dtype=np.int64)
    parts: list[tuple[str, list[str]]] = []
    task, splits = partial(map_split, job_path), range(len(job.splits))
    workers = min(options.num_workers, len(splits))
    with closing(run_tasks(task, splits, workers=workers, ray=options.ray, doing="tokenising")) as summaries:
        for number, summary in enumerate(summaries, 1):
            _tell_bad(summary, bad)
            counts.update(summary.counts)
            bucket_rows += np.array(summary.bucket_rows)
            parts += [(part.name, summary.labels) for part in summary.parts]
            progress("tokenising", number, len(splits))
    if not counts[READ]:
        raise DataError(
            "there is no usable record in the input",
            where=", ".join(options.inputs),
            why="\n".join(bad.examples),
            do="Name files that hold text; `--field ours=theirs` names the fields.",
        )
    counts[BAD] = bad.count
    labels = tuple(sorted({label for _, names in parts for label in names}))
    _refuse_numbers(labels, options)
    place = {label: number for number, label in enumerate(labels)}
    parts_path = work.write_parts([PartOfMap(name, [place[label] for label in names]) for name, names in parts])
    return _Mapped(counts, labels, bucket_rows, parts_path)


def _tell_bad(summary: MapSummary, bad: BadRecords) -> None:
    bad.count += summary.bad_count
    bad.examples = [*bad.examples, *summary.bad_examples][:EXAMPLES_SHOWN]
    bad.check()


def _refuse_numbers(labels: Sequence[str], options: PrepareOptions) -> None:
    """Labels such as 0.25 are no classes; CSV cannot tell them from names."""
    try:
        numbers = [float(label) for label in labels]
    except ValueError:
        return
    if any(not number.is_integer() for number in numbers):
        raise DataError(
            f"the labels are numbers, {len(labels)} different ones, and no names of classes",
            where=", ".join(options.inputs),
            why=f"Such as {', '.join(labels[:3])}.",
            do="For regression add --option labels=number; otherwise name the field: --field label=NAME.",
        )


def _number_shards(job: Job, bucket_rows: NDArray[np.int64]) -> list[Bucket]:
    """How many shards each bucket gets, and their numbers, from the rows before equal documents are dropped."""
    buckets, first = [], 0
    for number, rows in enumerate(bucket_rows):
        if number == job.num_buckets[0]:
            first = 0
        num_shards = -(-int(rows) // job.shard_rows)
        buckets.append(Bucket(number, first, num_shards))
        first += num_shards
    return buckets


def _reduce(
    task: Callable[[Bucket], ReduceSummary],
    job: Job,
    options: PrepareOptions,
    buckets: Sequence[Bucket],
    progress: Progress,
) -> list[ReduceSummary]:
    for name in job.names:
        folder = options.out / name
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    workers = min(options.num_workers, len(buckets))
    reduced = []
    with closing(run_tasks(task, buckets, workers=workers, ray=options.ray, doing="writing shards")) as summaries:
        for summary in summaries:
            reduced.append(summary)
            progress("writing shards", len(reduced), len(buckets))
    return reduced


def _expect_rows(name: str, shards: Sequence[Any], options: PrepareOptions, report: PrepareReport) -> None:
    if not shards:
        raise DataError(
            f"no row is left for {name}",
            where=", ".join(options.inputs),
            why=f"--heldout is {options.heldout_fraction}.\n{report}",
            do="Give more text, change --heldout or the filters, or part large .txt files: --documents paragraph.",
        )


def _facts(manifest: Manifest) -> dict[str, int]:
    return {"rows": manifest.num_rows, "tokens": manifest.num_tokens, "shards": len(manifest.shards)}
