"""Predictions for the records of a file, by one process or several.

Enters: a trained model, records of any input.  Leaves: a .jsonl file, each record with the field
`prediction`; a page of attributions where they are asked for.  Promises: records stay in order; the
output is there in full or not at all, and does not depend on the number of processes; a record that
cannot be used keeps its line, with the reason in `error`, as long as the budget allows.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from dist_lm import disk
from dist_lm.data.input_records import InputRecord, count_input, read_input
from dist_lm.data.kinds.base import Unusable
from dist_lm.data.preparation.runners import ray_slots, run_tasks
from dist_lm.data.process_pool import available_cores, ordered_map
from dist_lm.data.sources.format import ReadSettings
from dist_lm.errors import ConfigError, DataError
from dist_lm.predictors.attribution_page import page as attribution_page
from dist_lm.predictors.base import PredictOptions, Predictor
from dist_lm.predictors.registry import predictor_for
from dist_lm.trained import open_trained
from dist_lm.worker import prepare_environment

_BATCHES_AHEAD = 8
"""Batches whose records are sorted by length together: a chunk, which no two processes share."""
_EXAMPLES_SHOWN = 3
Bad = tuple[str, str]
"""Where a record is that cannot be used, and why it cannot."""


@dataclass(frozen=True)
class Request:
    """What to predict with, and from what."""

    model: str
    """RUN, RUN@best, RUN@1000 or a Hugging Face folder."""
    records: str
    """A file, folder, pattern or URL."""
    options: PredictOptions = field(default_factory=PredictOptions)
    task: str | None = None
    """None: the one that the model's head is for."""
    renamed: dict[str, str] = field(default_factory=dict)
    """Our name of a field -> its name in the records."""
    max_bad: int = 0
    """Records that may be unusable."""
    ranks: int = 1
    """Processes that share the records."""
    ray: bool = False
    """They are tasks of a Ray cluster."""
    reading: ReadSettings = field(default_factory=lambda: ReadSettings(text_documents="line"))
    """How the input is read."""

    def fields_of(self, line: InputRecord) -> dict[str, Any]:
        """The fields of a record by our names."""
        return {**line.fields, **{ours: line.fields.get(theirs) for ours, theirs in self.renamed.items()}}


@dataclass(frozen=True)
class Share:
    """One process's part of the records: [begin, end)."""

    number: int
    begin: int
    end: int


def predict_file(request: Request, out: Path, *, prediction_field: str = "prediction") -> tuple[int, int]:
    """Write the predictions; returns how many records there were, and how many of them were bad.

    Raises DataError where the input is empty or holds more bad records than allowed, ConfigError where
    `out` exists or the model is of another task.
    """
    page = page_of(out) if request.options.explain else None
    for new in filter(None, (out, page)):
        if new.exists():
            raise ConfigError(f"{new} exists already", where="--out", do="Choose a new file, or remove this one.")
    gpu = False
    if request.ray:
        slots, gpu = ray_slots()
        request, out = on_cluster(request, slots), out.absolute()
    shares = divide(request, count_input(request.records, request.reading))
    with disk.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        parts = Path(tempfile.mkdtemp(prefix=f".tmp-{out.name}-", dir=out.parent))
    try:
        work = partial(_write_share, request, parts, prediction_field)
        tasks = run_tasks(work, shares, workers=len(shares), ray=request.ray, doing="predicting", gpu=gpu)
        bad = [found for own in tasks for found in own]
        refuse_bad(request, bad)
        with disk.disk_errors(out), disk.WholeFile(out) as file:
            for share in shares:
                with _part(parts, share).open("rb") as part:
                    shutil.copyfileobj(part, file)
        if page is not None:
            disk.write_bytes(page, _page(request, out, prediction_field, shares[-1].end).encode())
    finally:
        shutil.rmtree(parts, ignore_errors=True)
    return shares[-1].end, len(bad)


def on_cluster(request: Request, slots: int) -> Request:
    """The request for Ray's workers: they are in another folder, and as many as the cluster has room for."""

    def whole(location: str) -> str:
        return location if "://" in location else str(Path(location).absolute())

    ranks = request.ranks if request.ranks > 1 else slots
    return replace(request, model=whole(request.model), records=whole(request.records), ranks=ranks)


def page_of(out: Path) -> Path:
    """The page of attributions beside a file of predictions."""
    return out.with_suffix(".html")


def _page(request: Request, out: Path, prediction_field: str, count: int) -> str:
    with out.open(encoding="utf-8") as file:
        written = (InputRecord("", json.loads(line)) for line in file)
        return attribution_page(
            ((request.fields_of(line), line.fields[prediction_field]) for line in written), num_records=count
        )


def divide(request: Request, count: int) -> list[Share]:
    """Contiguous shares of `count` records, as equal as can be; none is empty.

    Whole chunks: a record's neighbours in its batch, and so the last digits of what is predicted for it,
    are the same however many share.
    """
    size = request.options.batch_rows * _BATCHES_AHEAD
    num_chunks = -(-count // size)
    ranks = min(request.ranks, num_chunks)
    bounds = [min(count, size * (num_chunks * number // ranks)) for number in range(ranks + 1)]
    return [Share(number, bounds[number], bounds[number + 1]) for number in range(ranks)]


def in_processes(work: Callable[[Share], Any], shares: Sequence[Share], ranks: int) -> Iterator[Any]:
    """Results of all shares in order; more than one process only where there is more than one share."""
    yield from ordered_map(work, shares, workers=min(ranks, len(shares)), doing="predicting")


def refuse_bad(request: Request, bad: Sequence[Bad]) -> None:
    """DataError where more records cannot be used than allowed."""
    if len(bad) > request.max_bad:
        raise DataError(
            f"{len(bad)} bad record{'s' if len(bad) > 1 else ''}, and {request.max_bad} are allowed",
            where=bad[0][0],
            why="\n".join(f"{where}: {why}" for where, why in bad[:_EXAMPLES_SHOWN]),
            do=f"Correct the records, or allow more: --max-bad {max(10, 2 * len(bad))} counts and marks them.",
        )


def open_predictor(request: Request, share: Share) -> Predictor:
    """The model on this process's device; one rank's part of the cores, or its GPU."""
    prepare_environment()
    if request.ranks > 1:
        torch.set_num_threads(max(1, available_cores() // request.ranks))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", share.number % torch.cuda.device_count())
    return predictor_for(open_trained(request.model), request.task, request.options, device)


def chunks(request: Request, share: Share) -> Iterator[list[InputRecord]]:
    """The share's lines, as many at a time as are sorted together."""
    lines = read_input(request.records, request.reading, share.begin, share.end)
    while chunk := list(islice(lines, request.options.batch_rows * _BATCHES_AHEAD)):
        yield chunk


def usable(lines: Sequence[InputRecord], clean: Callable[[InputRecord], Any]) -> tuple[dict[int, Any], list[Bad]]:
    """What `clean` makes of the lines, by their place; and the place and reason of those it refuses."""
    cleaned: dict[int, Any] = {}
    bad: list[Bad] = []
    for place, line in enumerate(lines):
        try:
            if line.problem:
                raise Unusable(line.problem)
            cleaned[place] = clean(line)
        except Unusable as error:
            bad.append((line.where, str(error)))
    return cleaned, bad


def _part(parts: Path, share: Share) -> Path:
    return parts / f"{share.number:05d}.jsonl"


def _write_share(request: Request, parts: Path, prediction_field: str, share: Share) -> list[Bad]:
    """Predict one share into its part file; returns its bad records."""
    predictor = open_predictor(request, share)
    all_bad: list[Bad] = []

    def clean(line: InputRecord) -> Any:
        if prediction_field in line.fields:
            raise Unusable(f"there is a field '{prediction_field}' already (--prediction-field names another)")
        return predictor.clean(request.fields_of(line))

    with disk.disk_errors(parts), _part(parts, share).open("w", encoding="utf-8") as file:
        for lines in chunks(request, share):
            cleaned, bad = usable(lines, clean)
            all_bad += bad
            if len(all_bad) > request.max_bad:
                # The output is lost already; what is bad is told as far as it is known.
                return all_bad
            predictions = dict(zip(cleaned, predictor.predict(list(cleaned.values())), strict=True))
            if request.options.explain:
                for place, given in cleaned.items():
                    predictions[place]["explanations"] = predictor.explain(given, predictions[place])
            reasons = dict(bad)
            for place, line in enumerate(lines):
                said: dict[str, Any] = {prediction_field: predictions.get(place)}
                if line.where in reasons:
                    said["error"] = reasons[line.where]
                file.write(json.dumps({**line.fields, **said}, ensure_ascii=False, default=str) + "\n")
    return all_bad
