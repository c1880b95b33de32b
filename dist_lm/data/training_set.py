"""The training set: one data set or a mixture of several, in one order.

Enters: the sources of a configuration.  Leaves: their views and Orders, the Mixture, a fingerprint.
Promises: sources that cannot be trained on together are refused; what stands at a position follows
from the sources' content, never from where they lie or what they are called; a data set that is
listed twice is read in two orders.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_lm.config import SourceSpec
from dist_lm.data.location import redact
from dist_lm.data.manifest import Manifest
from dist_lm.data.mixture import Mixture, Stage
from dist_lm.data.order import Order, keyed_hash
from dist_lm.data.views import View, view_of
from dist_lm.errors import ConfigError, DataError

_SOURCE_SEED = 6
"""What a hash is for; order.py has the others."""


@dataclass(frozen=True)
class Source:
    """One data set of the mixture."""

    name: str
    location: str
    view: View
    order: Order
    first_sample_id: int
    """Sample ids are unique in the training set: those of a source follow those of the sources before it."""


class TrainingSet:
    """Sources and the order in which their rows are trained on."""

    def __init__(
        self,
        specs: Sequence[SourceSpec],
        *,
        seed: int,
        lanes: int,
        era: int,
        seq_len: int | None = None,
        stages: Sequence[tuple[int, Mapping[str, float]]] = (),
    ) -> None:
        """`stages` are positions of the stream, increasing, with the weights that change there.

        Raises ConfigError or DataError where the sources, weights or stages do not fit.
        """
        views = [view_of(Manifest.load(spec.path), seq_len, where=redact(spec.path)) for spec in specs]
        _refuse_misfits(specs, views)
        self.seed, self.lanes, self.era = seed, lanes, era
        names = source_names(specs)
        self.sources: tuple[Source, ...] = tuple(_sources(specs, names, views, seed=seed, lanes=lanes, era=era))
        weights = dict(zip(names, (spec.weight for spec in specs), strict=True))
        self.mixture = Mixture(names, list(_row_stages(self.sources, weights, stages)), seed=seed, lanes=lanes)

    @property
    def view(self) -> View:
        """What a task needs to know: kind, columns, labels, length.  The same for all sources."""
        return self.sources[0].view

    @property
    def num_rows(self) -> int:
        return sum(source.view.num_rows for source in self.sources)

    def fingerprint(self, position: int = 0) -> str:
        """Hash over everything that decides which rows stand before `position`, and which comes next.

        A saved position means something only to a training set with the same fingerprint there.
        """
        facts = {
            "sources": [source.view.fingerprint for source in self.sources],
            **self.sources[0].order.fingerprint_parts,
            "seed": self.seed,
            **(self.mixture.fingerprint_parts(position) if len(self.sources) > 1 else {}),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("ascii")).hexdigest()

    def identity(self, specs: Sequence[SourceSpec]) -> Any:
        """What a run folder remembers of its data: content, names and weights, as JSON values."""
        if len(self.sources) == 1:
            return self.view.fingerprint
        pairs = zip(self.sources, specs, strict=True)
        return [[source.name, spec.weight, source.view.fingerprint] for source, spec in pairs]

    def epochs(self, position: int) -> dict[str, float]:
        """How often the rows were read before `position`: `epoch`, or `epoch_<name>` for each of several."""
        rows = self.mixture.read_before(position)
        if len(self.sources) == 1:
            return {"epoch": int(rows[0]) / self.num_rows}
        return {
            f"epoch_{source.name}": int(read) / source.view.num_rows
            for source, read in zip(self.sources, rows, strict=True)
        }

    def refuse_larger_batch(self, global_rows: int) -> None:
        """DataError where a global batch would hold a row of a source more than once."""
        part = "one" if len(self.sources) == 1 else "its part of a"
        most = self.mixture.block_counts.max(axis=0) / self.mixture.block_counts[0].sum()
        for source, share in zip(self.sources, most, strict=True):
            wanted = int(np.ceil(share * global_rows))
            if wanted > source.view.num_rows:
                raise DataError(
                    f"the data set is smaller than {part} global batch of {global_rows} rows",
                    where=redact(source.location),
                    why=f"It has {source.view.num_rows} rows; a batch takes {wanted}.",
                    do="Prepare more data, or lower batch.global.",
                )


def source_names(specs: Sequence[SourceSpec]) -> list[str]:
    """The names that were given, else the last folder that is not `train`; equal ones are numbered."""
    given = [spec.name for spec in specs if spec.name]
    for name in given:
        if given.count(name) > 1:
            raise ConfigError(f"two sources are called '{name}'", where="data.train", do="Give each its own name.")
    names: list[str] = []
    for spec in specs:
        name = spec.name
        if not name:
            path = redact(spec.path).partition("?")[0]
            parts = [part for part in path.split("/") if part] or ["data"]
            folder = parts[-2] if parts[-1] == "train" and len(parts) > 1 else parts[-1]
            plain = name = re.sub(r"[^A-Za-z0-9_-]", "_", folder)
            number = 1
            while name in names or name in given:
                number += 1
                name = f"{plain}_{number}"
        names.append(name)
    return names


def _sources(
    specs: Sequence[SourceSpec], names: Sequence[str], views: Sequence[View], *, seed: int, lanes: int, era: int
) -> Iterator[Source]:
    first_sample_id = 0
    seen: Counter[str] = Counter()
    for spec, name, view in zip(specs, names, views, strict=True):
        own_seed = seed
        if len(specs) > 1:
            content = int(view.fingerprint[:16], 16)
            own_seed = int(keyed_hash(seed, _SOURCE_SEED, content, seen[view.fingerprint]))
        seen[view.fingerprint] += 1
        try:
            order = Order(view.shard_rows, seed=own_seed, lanes=lanes, era=era)
        except DataError as error:
            error.where = f"{error.where}, {redact(spec.path)}"
            raise
        yield Source(name, spec.path, view, order, first_sample_id)
        first_sample_id += view.num_rows


def _refuse_misfits(specs: Sequence[SourceSpec], views: Sequence[View]) -> None:
    """Rows of all sources go into one batch of one task."""
    facts: list[dict[str, Any]] = [
        {
            "kind": view.manifest.kind,
            "columns": view.columns,
            "tokenizer": view.manifest.tokenizer_sha256[:16],
            "labels": view.manifest.labels,
            "facts": view.manifest.facts,
            "length of rows": view.seq_len,
        }
        for view in views
    ]
    for spec, other in zip(specs, facts, strict=True):
        different = [name for name, value in other.items() if value != facts[0][name]]
        if different:
            raise DataError(
                f"two sources cannot be mixed: their {' and '.join(different)} differ",
                where=f"{redact(specs[0].path)} and {redact(spec.path)}",
                why="\n".join(f"{name}: {facts[0][name]} and {other[name]}"[:200] for name in different[:2]),
                do="Prepare all sources with one tokenizer, one kind and the same options.",
            )


def _row_stages(
    sources: Sequence[Source], weights: dict[str, float], stages: Sequence[tuple[int, Mapping[str, float]]]
) -> Iterator[Stage]:
    """Weights are shares of the tokens; the mixture deals in rows."""
    for position, changes in [(0, weights), *stages]:
        unknown = sorted(set(changes) - set(weights))
        if unknown:
            raise ConfigError(
                f"data.stages names the unknown source '{unknown[0]}'",
                where="data.stages",
                why=f"The sources are {', '.join(weights)}.",
                do="Use these names, or give a source of data.train another with `name`.",
            )
        weights = {**weights, **changes}
        yield Stage(position, tuple(weights[source.name] / (source.view.tokens_a_row or 1.0) for source in sources))
