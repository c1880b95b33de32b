"""The manifest of a data set: what its shards hold, and how to tell that they still do.

Enters: manifest.json of a data set (a folder or URL), or the entries of freshly written shards.  Leaves: a
Manifest, whose file is the commit point of the folder: a folder without it is not a data set.
Promises: a Manifest that was loaded or saved adds up (names, counts, columns, hashes), and its
fingerprint changes with anything that changes the rows or the order they are stored in.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from dist_lm.data.location import is_remote, join, local_path, redact
from dist_lm.data.storage import read_bytes, write_bytes
from dist_lm.errors import DataError, EnvironmentFault

MANIFEST_NAME = "manifest.json"
FORMAT = "dist_lm-blocks"
FORMAT_VERSION = 1
LABEL_COUNTS = "label_counts"

# Little-endian on disk, whatever the machine.
DTYPES = {
    "uint8": "<u1",
    "uint16": "<u2",
    "uint32": "<u4",
    "uint64": "<u8",
    "int32": "<i4",
    "int64": "<i8",
    "float32": "<f4",
}
DtypeName = Literal["uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# A dot would split the tar key; webdataset lowers the case of extensions and drops "_" members.
ColumnName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
_SHARD_NAME = re.compile(r"s-(\d{6})\.tar")
ShardName = Annotated[str, Field(pattern=f"^{_SHARD_NAME.pattern}$")]


def shard_name(number: int) -> str:
    return f"s-{number:06d}.tar"


@dataclass(frozen=True)
class Column:
    """One array of a data set: a row of it has this type and shape."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: ColumnName
    dtype: DtypeName
    shape: tuple[PositiveInt, ...] = ()
    """Shape of one row; () for one number a row."""
    lengths: str = ""
    """Name of the column that tells how many places of a row are filled, from the first on; the rest
    is padding, which is not stored and reads as 0.  Empty: all are."""

    # Cached: asked for with every block that is read.
    @cached_property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(DTYPES[self.dtype])

    @cached_property
    def row_places(self) -> int:
        """Numbers in a row."""
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return self.numpy_dtype.itemsize * self.row_places


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest knows about one shard file and its index."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: ShardName
    rows: PositiveInt
    blocks: PositiveInt
    bytes: PositiveInt
    sha256: Sha256
    index_sha256: Sha256
    content: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    """Hash over the contents of all members; stands in every tar header, so that each block tells which
    shard of which preparation it is from."""

    @property
    def index_name(self) -> str:
        return self.name + ".idx"

    # Cached: asked for with every block that is read.
    @cached_property
    def number(self) -> int:
        """The number that the keys of its blocks begin with."""
        match = _SHARD_NAME.fullmatch(self.name)
        assert match is not None, self.name
        return int(match.group(1))


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    kind: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
    """One of data/kinds/registry.py."""
    columns: tuple[Column, ...]
    block_rows: PositiveInt
    seq_len: PositiveInt
    vocab_size: PositiveInt
    tokenizer_sha256: Sha256
    num_rows: NonNegativeInt
    num_tokens: NonNegativeInt
    """Tokens that are not padding."""
    shards: tuple[ShardEntry, ...]
    labels: tuple[str, ...] = ()
    """Names of the classes, in the order of the label numbers; empty for other kinds."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What a task must know of the rows beyond their columns (Kind.facts).  JSON values only."""
    preparation: dict[str, Any] = field(default_factory=dict)
    """Identity of the options and inputs, counts of what was kept and dropped, and under LABEL_COUNTS how
    often each label stands in the rows.  JSON values only."""

    @classmethod
    def load(cls, location: str | Path) -> Manifest:
        path = join(location, MANIFEST_NAME)
        content = _read(path)
        try:
            # One pass over megabytes of shards, in Rust; what is wrong with a file is found out afterwards.
            body = _FILE_ADAPTER.validate_json(content, strict=True)
        except ValidationError as error:
            _refuse_other_files(path, content)
            raise _not_valid(path, error) from None
        manifest = cls(**{each.name: getattr(body, each.name) for each in fields(cls)})
        manifest._check(path)
        return manifest

    def save(self, location: str | Path) -> None:
        """Publish the data set: written last, and there completely or not at all."""
        path = join(location, MANIFEST_NAME)
        text = json.dumps({"format": FORMAT, "version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"
        try:
            _ADAPTER.validate_json(json.dumps(asdict(self)), strict=True)
        except ValidationError as error:
            raise _not_valid(path, error) from None
        self._check(path)
        write_bytes(path, text.encode("ascii"))

    @cached_property
    def fingerprint(self) -> str:
        """Hash over what decides the rows and their storage order; equal fingerprints mean equal rows."""
        facts = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "kind": self.kind,
            "columns": [asdict(column) for column in self.columns],
            "block_rows": self.block_rows,
            "seq_len": self.seq_len,
            "vocab_size": self.vocab_size,
            "tokenizer_sha256": self.tokenizer_sha256,
            "labels": self.labels,
            "facts": self.facts,
            "shards": [(shard.name, shard.rows, shard.sha256) for shard in self.shards],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode("ascii")).hexdigest()

    @property
    def row_bytes(self) -> int:
        """Bytes of a row in memory."""
        return sum(column.row_bytes for column in self.columns)

    @property
    def shard_rows(self) -> tuple[int, ...]:
        return tuple(shard.rows for shard in self.shards)

    def column(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        known = ", ".join(column.name for column in self.columns)
        raise DataError(
            f"the data set has no column '{name}'",
            why=f"It is of kind '{self.kind}' and has the columns {known}.",
            do="Prepare a data set of the kind that the task needs.",
        )

    def block_rows_of(self, shard: int, block: int) -> int:
        """Rows of one block: all blocks are full but the last of a shard."""
        return min(self.block_rows, self.shards[shard].rows - block * self.block_rows)

    def _check(self, path: str) -> None:
        problem = next(self._problems(), None)
        if problem is not None:
            raise DataError(
                "the manifest of a data set contradicts itself",
                where=redact(path),
                why=problem,
                do="Prepare the data set again; do not edit manifests by hand.",
            )

    def _problems(self) -> Iterator[str]:
        names = [column.name for column in self.columns]
        if not names:
            yield "columns: there is none"
        for name in sorted({name for name in names if names.count(name) > 1}):
            yield f"columns: '{name}' is listed twice"
        for column in self.columns:
            if column.lengths:
                yield from self._problems_of_lengths(column)
        # Increasing names also mean that no shard is listed twice.
        for previous, shard in pairwise(self.shards):
            if shard.name == previous.name:
                yield f"shards: {shard.name} is listed twice"
            elif shard.name < previous.name:
                yield f"shards: {shard.name} is listed after {previous.name}; a shard twice, or out of order"
        stored_row_bytes = sum(column.row_bytes for column in self.columns if not column.lengths)
        for shard in self.shards:
            blocks = -(-shard.rows // self.block_rows)
            if shard.blocks != blocks:
                yield (
                    f"{shard.name}: {shard.rows} rows in blocks of {self.block_rows} are {blocks} blocks, "
                    f"not {shard.blocks}"
                )
            if shard.bytes < shard.rows * stored_row_bytes:
                yield f"{shard.name}: {shard.bytes} bytes are too few for {shard.rows} rows"
        total = sum(self.shard_rows)
        if total != self.num_rows:
            yield f"num_rows is {self.num_rows}, but the shards hold {total} rows together"
        if len(set(self.labels)) != len(self.labels):
            yield "labels: a name is listed twice"

    def _problems_of_lengths(self, column: Column) -> Iterator[str]:
        counts = next((other for other in self.columns if other.name == column.lengths), None)
        if len(column.shape) != 1:
            yield f"columns: '{column.name}' has lengths and the shape {column.shape}, which must be (capacity,)"
        if counts is None or counts.shape or counts.dtype == "float32":
            yield f"columns: the lengths of '{column.name}' are '{column.lengths}', which is no column of integers"


@dataclass(frozen=True, kw_only=True)
class _ManifestFile(Manifest):
    """What stands in manifest.json."""

    format: Literal["dist_lm-blocks"]
    version: Literal[1]


_ADAPTER: TypeAdapter[Manifest] = TypeAdapter(Manifest)
_FILE_ADAPTER: TypeAdapter[_ManifestFile] = TypeAdapter(_ManifestFile)
_AGAIN = "Prepare the data set again, or give the folder that `dist-lm data prepare` has written."


def _read(path: str) -> bytes:
    try:
        return read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        why = "The folder does not exist."
        if is_remote(path) or local_path(path).parent.is_dir():
            why = "The folder has no manifest: its preparation was not finished, or it is no data set."
        raise DataError("this is not a data set", where=redact(path), why=why, do=_AGAIN) from None
    except OSError as error:
        raise EnvironmentFault("cannot read a manifest", where=redact(path), why=str(error)) from error


def _refuse_other_files(path: str, written: bytes) -> None:
    """DataError where this is no JSON, or of another format or version."""
    try:
        content = json.loads(written)
    except ValueError as error:
        raise DataError("a manifest is not JSON", where=redact(path), why=str(error), do=_AGAIN) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        why = f"Expected format '{FORMAT}'."
        raise DataError("a manifest has an unknown format", where=redact(path), why=why, do=_AGAIN)
    version = content.get("version")
    if version != FORMAT_VERSION:
        raise DataError(
            f"a data set has format version {version!r}",
            where=redact(path),
            why=f"This dist_lm reads version {FORMAT_VERSION}.",
            do="Use the dist_lm that has written it, or prepare the data set again.",
        )


def _not_valid(path: str, error: ValidationError) -> DataError:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    return DataError(
        "a manifest has a wrong field",
        where=redact(path),
        why=f"{key}: {first['msg']}",
        do="Prepare the data set again; do not edit manifests by hand.",
    )
