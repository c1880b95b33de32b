"""What the user names as input, as files, parts of files, and records.

Enters: files, folders, patterns or URLs.  Leaves: Records, in a fixed order: the inputs sorted by
location, each file once.
Promises: nothing is skipped in silence: what cannot be used is counted, told with file and line, and
above the limit it is an error.  What the format of a file is, its suffix tells, or the user.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dist_lm.data.kinds import fields as checked
from dist_lm.data.kinds.base import Empty, Unusable
from dist_lm.data.location import is_remote, local_path, redact
from dist_lm.data.sources.columnar import hf_dataset_files
from dist_lm.data.sources.files import COMPRESSIONS, SourceFile, list_files
from dist_lm.data.sources.format import Format, ReadSettings, Split
from dist_lm.data.sources.record import BadRecords, Record
from dist_lm.data.sources.registry import BY_SUFFIX, FORMATS, format_named
from dist_lm.errors import DataError


def list_inputs(inputs: Sequence[str], settings: ReadSettings) -> list[SourceFile]:
    """The files that the inputs stand for, sorted, each once.  At least one for every input."""
    found: dict[str, SourceFile] = {}
    for given in inputs:
        files = _expand(given, settings)
        if not files:
            raise DataError(
                "there are no readable files in an input",
                where=redact(given),
                why=f"Looked for {', '.join(BY_SUFFIX)}, also with {' or '.join(COMPRESSIONS)} behind.",
                do="Give the folder that holds your data, or name the format: --format text.",
            )
        for file in files:
            name = file.location if is_remote(file.location) else os.path.realpath(file.location)
            found.setdefault(name, file)
    if not found:
        raise DataError("no input was given", do="Name files, folders, patterns or URLs.")
    return sorted(found.values(), key=lambda file: file.location)


def format_of(file: SourceFile, settings: ReadSettings) -> Format:
    """DataError where neither the user nor the suffix tells."""
    if settings.format is not None:
        return format_named(settings.format)
    if file.suffix not in BY_SUFFIX:
        raise DataError(
            f"files of kind '{file.suffix}' cannot be read",
            where=redact(file.location),
            why=f"Known are {', '.join(BY_SUFFIX)}, also with {' or '.join(COMPRESSIONS)} behind.",
            do=f"Name the format, if it is one of these: --format {'|'.join(FORMATS)}",
        )
    return BY_SUFFIX[file.suffix]


def read_split(split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
    """The records of a part of a file, their fields by our names."""
    for record in format_named(settings.format or split.format).read(split, settings, bad):
        if not settings.fields:
            yield record
            continue
        try:
            fields = {**record.fields, **{ours: _at(record.fields, path) for ours, path in settings.fields.items()}}
        except Unusable as reason:
            bad.add(record.where, str(reason))
            continue
        yield Record(fields, record.where)


def read_records(inputs: Sequence[str], settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
    """All records of the inputs, one file after the other."""
    for file in list_inputs(inputs, settings):
        yield from read_split(Split(file.location, format_of(file, settings).name), settings, bad)


def read_texts(inputs: Sequence[str], settings: ReadSettings, *, max_bad: int = 0) -> Iterator[str]:
    """The texts of all records that have one, empty ones left out."""
    bad = BadRecords(max_bad)
    for record in read_records(inputs, settings, bad):
        try:
            yield checked.text(record.fields, "text")
        except Empty:
            continue
        except Unusable as reason:
            bad.add(record.where, str(reason))


def _expand(given: str, settings: ReadSettings) -> list[SourceFile]:
    if not is_remote(given):
        path = local_path(given).expanduser()
        saved = hf_dataset_files(path) if path.is_dir() else None
        if saved is not None:
            return [SourceFile(str(file), file.stat().st_size) for file in saved]
    files = list_files(given, lambda file: settings.format is not None or file.suffix in BY_SUFFIX)
    for file in files:
        format_of(file, settings)
    return files


def _at(fields: Mapping[str, Any], path: str) -> Any:
    """The field of this name, or the one that a path of names leads to."""
    if path in fields:
        return fields[path]
    value: Any = fields
    for name in path.split("."):
        if not isinstance(value, Mapping) or name not in value:
            have = ", ".join(sorted(map(str, fields))[:5])
            raise Unusable(f"no field '{path}' (there are: {have})")
        value = value[name]
    return value
