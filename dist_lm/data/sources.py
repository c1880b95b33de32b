"""Text files of the user, as records.

Enters: files, folders or glob patterns of .txt and .jsonl.  Leaves: Records, in a fixed order (inputs
sorted by path), each knowing the file and line it came from.
Promises: nothing is skipped in silence: what cannot be used is counted, told with file:line, and
above the limit it is an error.  Memory holds one line, or one file where a file is one document.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dist_lm.disk import disk_errors
from dist_lm.errors import DataError

TEXT_SUFFIXES = (".txt",)
JSON_SUFFIXES = (".jsonl", ".ndjson")
SUFFIXES = TEXT_SUFFIXES + JSON_SUFFIXES

TextDocuments = Literal["file", "paragraph", "line"]
"""What one document of a .txt file is: all of it, a run of lines between blank ones, or a line."""

_EXAMPLES_SHOWN = 3


class Record(NamedTuple):
    """One document, or a part of one where records are grouped."""

    text: str
    label: str | None
    where: str
    """file:line, for messages."""
    group: str | None = None
    """Neighbours of the same group are parts of one document."""


@dataclass
class BadRecords:
    """Counts what could not be used, and stops the reading above `limit`."""

    limit: int = 0
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """The first ones, each "file:line: reason"."""

    def add(self, where: str, why: str) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES_SHOWN:
            self.examples.append(f"{where}: {why}")
        if self.count > self.limit:
            raise DataError(
                f"{self.count} bad record{'s' if self.count > 1 else ''}, and {self.limit} are allowed",
                where=where,
                why="\n".join(self.examples),
                do=f"Correct the input, or allow more: --max-bad {max(10, 2 * self.count)} skips and counts them.",
            )


def list_inputs(inputs: Sequence[str]) -> list[Path]:
    """The files that the inputs stand for, sorted, each once.  At least one for every input."""
    found: dict[str, Path] = {}
    for given in inputs:
        for path in _expand(given):
            found.setdefault(os.path.realpath(path), path)
    if not found:
        raise DataError("no input was given", do="Name files, folders or patterns of .txt or .jsonl.")
    return sorted(found.values(), key=str)


def read_records(
    inputs: Sequence[str],
    *,
    text_field: str = "text",
    label_field: str = "label",
    group_field: str | None = None,
    need_label: bool = False,
    documents: TextDocuments = "file",
    max_bad: int = 0,
    bad: BadRecords | None = None,
) -> Iterator[Record]:
    """All usable records of the inputs.  Give `bad` to see afterwards what was skipped."""
    bad = BadRecords(max_bad) if bad is None else bad
    for path in list_inputs(inputs):
        if path.suffix in TEXT_SUFFIXES:
            if need_label:
                raise DataError(
                    "a text file has no labels",
                    where=str(path),
                    do=f'Give .jsonl, a line like {{"{text_field}": "...", "{label_field}": "..."}} each.',
                )
            yield from _read_text(path, documents, bad)
        else:
            yield from _read_json_lines(path, text_field, label_field, group_field, need_label, bad)


def _expand(given: str) -> list[Path]:
    path = Path(given).expanduser()
    if path.exists():
        return _files_at(path)
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    matches = [match for match in matches if match.exists()]
    if not matches:
        raise DataError(
            "an input does not exist",
            where=given,
            why="No file, no folder, and no pattern that matches any.",
            do="Look at the path; quote patterns so that the shell leaves them alone.",
        )
    return [file for match in matches for file in _files_at(match)]


def _files_at(path: Path) -> list[Path]:
    if path.is_dir():
        files = [file for file in path.rglob("*") if _is_readable_kind(file, path)]
        if not files:
            raise DataError(
                "a folder holds no readable files",
                where=str(path),
                why=f"Looked for {', '.join(SUFFIXES)} in it and below.",
                do="Give the folder that holds your text, or rename the files to their kind.",
            )
        return files
    if path.suffix not in SUFFIXES or not path.is_file():
        raise DataError(
            f"files of kind '{path.suffix}' cannot be read" if path.is_file() else "an input is not a file",
            where=str(path),
            why=f"Known kinds: {', '.join(SUFFIXES)}.",
            do="Convert the file: plain text as .txt, one JSON object a line as .jsonl.",
        )
    return [path]


def _is_readable_kind(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return file.suffix in SUFFIXES and not hidden and file.is_file()


def _read_text(path: Path, documents: TextDocuments, bad: BadRecords) -> Iterator[Record]:
    for line, raw in _text_pieces(path, documents):
        text = _decode(raw, path, line, bad)
        if text is not None and text.strip():
            yield Record(text, None, f"{path}:{line}")


def _text_pieces(path: Path, documents: TextDocuments) -> Iterator[tuple[int, bytes]]:
    """Documents of a text file with the line they begin at, not yet decoded."""
    with disk_errors(path, "read an input"), open(path, "rb") as file:
        if documents == "file":
            yield 1, file.read()
        elif documents == "line":
            yield from enumerate(file, 1)
        else:
            yield from _paragraphs(file)


def _paragraphs(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    begun, pending = 1, list[bytes]()
    for number, line in enumerate(lines, 1):
        if line.strip():
            begun = begun if pending else number
            pending.append(line)
        elif pending:
            yield begun, b"".join(pending)
            pending = []
    if pending:
        yield begun, b"".join(pending)


def _read_json_lines(
    path: Path, text_field: str, label_field: str, group_field: str | None, need_label: bool, bad: BadRecords
) -> Iterator[Record]:
    with disk_errors(path, "read an input"), open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            line = _decode(raw, path, number, bad)
            if line is None or not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                fields = _json_object(line)
                text = _text_of(fields, text_field)
                label = _label_of(fields, label_field, need_label)
                group = _group_of(fields, group_field)
            except _Unusable as reason:
                bad.add(where, str(reason))
                continue
            yield Record(text, label, where, group)


class _Unusable(Exception):
    """Why one record cannot be used."""


def _json_object(line: str) -> dict[str, Any]:
    try:
        fields = json.loads(line)
    except RecursionError:
        raise _Unusable("JSON is nested too deeply") from None
    except ValueError as error:
        raise _Unusable(f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _Unusable(f"a JSON object was expected, not {type(fields).__name__}")
    return fields


def _text_of(fields: dict[str, Any], name: str) -> str:
    if name not in fields:
        have = ", ".join(sorted(fields)[:5])
        raise _Unusable(f"no field '{name}' (there are: {have})")
    text = fields[name]
    if not isinstance(text, str):
        raise _Unusable(f"field '{name}' is {type(text).__name__}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can spell half of a surrogate pair, which is no character and cannot be stored.
        raise _Unusable(f"field '{name}' holds half of a surrogate pair") from None
    return text


def _label_of(fields: dict[str, Any], name: str, need: bool) -> str | None:
    label = fields.get(name)
    if isinstance(label, str) and label:
        return label
    if isinstance(label, int):
        return str(label)
    if need:
        raise _Unusable(f"field '{name}' must be a text or a whole number, not {json.dumps(label)[:40]}")
    return None


def _group_of(fields: dict[str, Any], name: str | None) -> str | None:
    if name is None:
        return None
    group = fields.get(name)
    if not isinstance(group, str):
        raise _Unusable(f"field '{name}', by which records are grouped, is not a text")
    return group


def _decode(raw: bytes, path: Path, line: int, bad: BadRecords) -> str | None:
    """Text of a piece that begins at `line`, or None where it is not UTF-8 (reported)."""
    if line == 1:
        raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        bad.add(f"{path}:{line}", f"not UTF-8: byte 0x{raw[error.start]:02x}")
        return None
