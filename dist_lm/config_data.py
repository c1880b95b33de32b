"""The `data:` section: which data sets a run reads, in what mixture and order.

Enters: plain values.  Leaves: a DataSection.  Promises: a mistake inside a list names the item and
its key.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from dist_lm.config_section import Section, refuse

_SECRET = re.compile(r"://([^/]*:[^/]*@|[^?]*\?)")


def holds_secret(location: str) -> bool:
    """Whether a URL holds, or may hold, a credential."""
    return _SECRET.search(location) is not None


class SourceSpec(BaseModel):
    """One data set of a mixture."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    path: str
    """Prepared data set: a folder or URL with manifest.json (docs/data-storage.md)."""
    weight: NonNegativeFloat = 1.0
    """Share of the tokens of training, before it is divided by the sum of all weights."""
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]*$")] = ""
    """What data.stages and the metrics call it; by default the last folder that is not `train`."""


class StageSpec(BaseModel):
    """Weights that change during the run."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    from_step: Annotated[int, Field(ge=2)]
    """The first step with these weights; steps are counted from 1."""
    weights: dict[str, NonNegativeFloat]
    """New weights by source; sources that are not named keep theirs."""


def _read_sources(value: Any) -> Any:
    """A location, or a list of locations and sections; with the place in the list of whatever is wrong."""
    if not isinstance(value, list | tuple) or not value:
        refuse([] if isinstance(value, str) else [("data.train is a location or a list of sources", ("data.train",))])
        return value
    items = [{"path": item} if isinstance(item, str) else item for item in value]
    return tuple(_read_items(SourceSpec, items, "data.train"))


def _read_heldout(value: Any) -> Any:
    several = isinstance(value, dict) and value and all(isinstance(item, str) for item in value.values())
    if value is not None and not isinstance(value, str) and not several:
        refuse([("data.heldout is a location, or several by name", ("data.heldout",))])
    return value


def _read_stages(value: Any) -> Any:
    if not isinstance(value, list | tuple):
        refuse([("data.stages is a list of sections with from_step and weights", ("data.stages",))])
    return tuple(_read_items(StageSpec, value, "data.stages"))


def _read_items(model: type[BaseModel], items: Any, key: str) -> Iterator[Any]:
    """The items of a list of sections; a mistake names the item and the key inside it."""
    for place, item in enumerate(items):
        try:
            yield model.model_validate(item)
        except ValidationError as error:
            mistakes = error.errors(include_url=False)
            names = ", ".join(model.model_fields)
            refuse(
                [
                    (
                        f"{key}[{place}]: {'.'.join(map(str, found['loc'])) or 'item'}: {found['msg']} (keys: {names})",
                        (key,),
                    )
                    for found in mistakes
                ]
            )


class CacheSection(Section):
    dir: Path | None = None
    """Folder on this machine for copies of remote shards, shared by its ranks; empty: read them where they lie."""
    limit_gb: PositiveFloat = 100.0
    """Most that the copies take (1 GB is 1e9 bytes); should hold two shards for each lane that a machine reads."""


class DataSection(Section):
    train: Annotated[str | tuple[SourceSpec, ...], BeforeValidator(_read_sources)]
    """Prepared data set (a folder or URL with manifest.json), or a list to mix: `- {path: ..., weight: ...}`."""
    stages: Annotated[tuple[StageSpec, ...], BeforeValidator(_read_stages)] = ()
    """Steps at which the weights of the mixture change: `- {from_step: ..., weights: {NAME: ...}}`."""
    heldout: Annotated[str | dict[str, str] | None, BeforeValidator(_read_heldout)] = None
    """Prepared data set for evaluation, or several by name: `{NAME: PATH}`."""
    tokenizer: Path
    """Tokenizer folder; must be the one that the data sets were prepared with."""
    seq_len: PositiveInt | None = None
    """Tokens of a row, for data sets of kind `tokens`, which need it.  Other kinds were packed for a
    length when they were prepared."""
    lanes: PositiveInt = 16
    """Readers that go through the shards side by side (design note: data order)."""
    era: PositiveInt = 1024
    """Rows of a lane that are shuffled together."""
    cache: CacheSection = CacheSection()
    on_damage: Literal["fail", "substitute"] = "fail"
    """What a damaged block of the training data does: end the run, or be replaced by the next whole one."""
    max_quarantine: PositiveInt = 64
    """Blocks, or whole shards, that may be replaced before the run ends."""

    @property
    def sources(self) -> tuple[SourceSpec, ...]:
        """What `train` names, one data set or several."""
        return (SourceSpec(path=self.train),) if isinstance(self.train, str) else self.train

    @property
    def heldout_sets(self) -> dict[str, str]:
        """Location of each held-out set by name; the name of a single one is empty."""
        if isinstance(self.heldout, dict):
            return self.heldout
        return {"": self.heldout} if self.heldout else {}

    @property
    def locations(self) -> list[str]:
        """All data sets, those of training first."""
        return [*(source.path for source in self.sources), *self.heldout_sets.values()]

    @property
    def keys_with_secrets(self) -> list[str]:
        """Keys with a URL that holds, or may hold, a credential."""
        locations = {
            "data.train": [source.path for source in self.sources],
            "data.heldout": list(self.heldout_sets.values()),
        }
        return [key for key, found in locations.items() if any(holds_secret(location) for location in found)]
