"""What a file format is: how its files are parted, and how a part becomes records.

Enters: a file, or a part of it.  Leaves: records.
Promises: the parts of a file, read one after the other, give the records of the file, each once.
A subclass a file; registry.py names them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dist_lm.data.sources.files import SourceFile
from dist_lm.data.sources.record import BadRecords, Record

TextDocuments = Literal["file", "paragraph", "line"]
"""What one document of a .txt file is: all of it, a run of lines between blank ones, or a line."""
TEXT_DOCUMENTS = ("file", "paragraph", "line")


@dataclass(frozen=True)
class ReadSettings:
    """How the user wants the files read."""

    format: str | None = None
    """Name of the format of all files, or module:Class of one written outside; None: the suffix tells."""
    fields: Mapping[str, str] = field(default_factory=dict)
    """Our name of a field, and where the source has it; a dot goes into nested ones."""
    wanted: tuple[str, ...] = ()
    """Fields that every record must have, by the source's names."""
    optional: tuple[str, ...] = ()
    """Fields that will be looked at where they are.  A table reads these and `wanted` only; all, if none is wanted."""
    text_documents: TextDocuments = "file"
    tokens_column: int = 0
    """Of a CoNLL file; negative numbers count from the end."""
    tags_column: int = -1


@dataclass(frozen=True)
class Split:
    """A part of the input that one task reads."""

    location: str
    format: str
    start: int = 0
    """First byte, or first row group."""
    end: int | None = None
    """The byte or row group after the last; None: to the end of the file."""


class Format(ABC):
    """One format."""

    name: ClassVar[str]
    """--format on the command line."""
    suffixes: ClassVar[tuple[str, ...]]

    def splits(self, file: SourceFile, target_bytes: int, settings: ReadSettings) -> list[Split]:
        """Parts of about `target_bytes`; the whole file where it cannot be parted."""
        return [Split(file.location, self.name)]

    def text_bytes(self, file: SourceFile) -> int:
        """About how much text there is."""
        return file.text_bytes

    @abstractmethod
    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        """The records of a part; what is no record goes to `bad`."""


def byte_ranges(file: SourceFile, format_name: str, target_bytes: int) -> list[Split]:
    """Parts of a file of lines: a part owns the lines that begin in it."""
    if file.compression or file.num_bytes <= target_bytes:
        return [Split(file.location, format_name)]
    starts = range(0, file.num_bytes, target_bytes)
    return [Split(file.location, format_name, at, min(at + target_bytes, file.num_bytes)) for at in starts]
