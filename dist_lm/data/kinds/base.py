"""What a kind of data set is: which fields of a record it needs, and which columns they become.

Enters: the fields of records, a tokenizer, the rules.  Leaves: PackedRows.
Promises: packing is a pure function of records, tokenizer and rules, light to import: preparation
runs it in a pool of processes or as a task on another machine, and prediction runs it on the records
of a request, with the same result.

A subclass a file; registry.py names them all.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from dist_lm.data.manifest import Column
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError

_NO_TEXT = frozenset({"id", "label", "tags", "answers"})

Fields = Mapping[str, Any]
"""Fields of one record, as the source has them: text, numbers, lists."""


class Unusable(Exception):
    """Why one record cannot be used; the reader adds file and line."""


class Empty(Unusable):
    """The record holds nothing: it is dropped and counted, and no mistake."""


@dataclass(frozen=True)
class PackingRules:
    """What rows look like."""

    seq_len: int
    """Tokens of a model input, special tokens included."""
    min_tokens: int
    """Rows with fewer are dropped, and counted."""
    token_dtype: Literal["uint16", "uint32"]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the kind's own, such as doc_stride; JSON values, each one of `Kind.options`."""


@dataclass
class PackedRows:
    """Rows of some records, in the order of the records."""

    document: NDArray[np.int64]
    """[rows]; which of the records a row is of."""
    ordinal: NDArray[np.int64]
    """[rows]; the row's number inside its record."""
    columns: dict[str, NDArray[Any]]
    """By name, [rows, *shape], as `Kind.columns` says.  Places behind a row's length are padding."""
    lost: NDArray[np.int64]
    """[records, 4]: rows too short, tokens in them, rows truncated, tokens cut off."""
    labels: tuple[str, ...] = ()
    """Names that the label columns number, in this PackedRows alone.  Preparation puts the names of
    all parts into one sorted list and renumbers."""


class Kind(ABC):
    """One kind of data set."""

    name: ClassVar[str]
    """`kind` in manifest.json, and --kind on the command line."""
    fields: ClassVar[Mapping[str, str]]
    """Fields that a record must have, each with what it holds, in words."""
    optional_fields: ClassVar[Mapping[str, str]] = {}
    options: ClassVar[Mapping[str, str]] = {}
    """Settings of this kind (PackingRules.options), each with what it does, in words."""
    token_columns: ClassVar[tuple[str, ...]]
    """Columns that hold tokens of the texts, of those that `columns` may name; num_tokens counts them."""
    label_columns: ClassVar[tuple[str, ...]] = ()
    """Columns that hold places in `PackedRows.labels`.  Other values in them (-1, the largest unsigned
    number) say that there is no label, and stay as they are."""
    whole_documents: ClassVar[bool] = False
    """The rows of a document stay together, in their order: the shuffle moves documents."""
    min_tokens: ClassVar[int] = 1
    block_rows: ClassVar[int] = 256
    shard_rows: ClassVar[int] = 65536
    """These three: what preparation takes where the user does not say."""

    def check_rules(self, rules: PackingRules) -> None:
        """Raise ConfigError where the options cannot be; more of it in the kinds that have options."""
        for name in rules.options:
            if name not in self.options:
                known = ", ".join(self.options) or "none"
                raise ConfigError(
                    f"kind `{self.name}` has no option `{name}`", where="--option", do=f"It has these: {known}."
                )

    @abstractmethod
    def clean(self, fields: Fields, rules: PackingRules) -> dict[str, Any]:
        """What this kind uses of a record, checked.  Raises Unusable with the reason."""

    def content(self, cleaned: Fields) -> str:
        """What makes two records the same: decides duplicates, the held-out split and the shuffle."""
        return json.dumps(cleaned, sort_keys=True, ensure_ascii=False)

    def text(self, cleaned: Fields) -> str:
        """What the filters of preparation look at: all that is written in the record."""
        named = [value for name, value in cleaned.items() if name not in _NO_TEXT]
        return "\n".join(value if isinstance(value, str) else " ".join(_strings(value)) for value in named)

    @abstractmethod
    def columns(self, rules: PackingRules) -> tuple[Column, ...]:
        """The columns of a row."""

    @abstractmethod
    def pack(self, records: Sequence[Fields], tokenizer: Tokenizer, rules: PackingRules) -> PackedRows:
        """Rows of cleaned records."""

    def join(self, columns: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The rows of one shard as they are stored: most kinds leave them as they are.

        Called once duplicates are dropped and the held-out documents are set apart, on rows in the
        order of the shuffle: here a kind may put several short rows into one.
        """
        return columns

    def facts(self, tokenizer: Tokenizer, rules: PackingRules) -> dict[str, Any]:
        """What a task must know of the rows beyond their columns; goes into the manifest (`facts`)."""
        return {}


def _strings(value: Any) -> Iterator[str]:
    """All texts inside lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)
