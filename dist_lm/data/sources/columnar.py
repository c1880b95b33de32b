"""Tables of Arrow: Parquet files, and the .arrow files of Hugging Face data sets on disk.

Enters: row groups or record batches.  Leaves: a record a row; the numbers of a ClassLabel column of
`datasets` become the names of the classes, and -1, which means no label there, becomes nothing.
Memory: one row group's pages, or one record batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dist_lm.data.sources.files import SourceFile, reading_seekable
from dist_lm.data.sources.format import Format, ReadSettings, Split
from dist_lm.data.sources.record import BadRecords, Record, Where
from dist_lm.errors import DataError

_ROWS_AT_ONCE = 256
_HF_STATE, _HF_DICT = "state.json", "dataset_dict.json"


class Parquet(Format):
    name = "parquet"
    suffixes = (".parquet",)

    def splits(self, file: SourceFile, target_bytes: int, settings: ReadSettings) -> list[Split]:
        splits, start, size = [], 0, 0
        groups = _group_bytes(file)
        for group, num_bytes in enumerate(groups):
            size += num_bytes
            if size >= target_bytes or group + 1 == len(groups):
                splits.append(Split(file.location, self.name, start, group + 1))
                start, size = group + 1, 0
        return splits

    def text_bytes(self, file: SourceFile) -> int:
        return sum(_group_bytes(file))

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        with reading_seekable(split.location) as file, pq.ParquetFile(file, page_checksum_verification=True) as table:
            end = table.num_row_groups if split.end is None else split.end
            first = sum(table.metadata.row_group(group).num_rows for group in range(split.start))
            names = _needed_columns(table.schema_arrow, settings)
            batches = table.iter_batches(_ROWS_AT_ONCE, row_groups=range(split.start, end), columns=names)
            yield from _records(batches, table.schema_arrow, split.location, first)


class Arrow(Format):
    name = "arrow"
    suffixes = (".arrow",)

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        with reading_seekable(split.location) as file:
            magic = file.read(6)
            file.seek(0)
            # `datasets` writes the stream format; Arrow's own tools may write the other.
            if magic == b"ARROW1":
                table = pa.ipc.open_file(file)
                batches = map(table.get_batch, range(table.num_record_batches))
                yield from _records(batches, table.schema, split.location, 0)
            else:
                with pa.ipc.open_stream(file) as stream:
                    yield from _records(stream, stream.schema, split.location, 0)


def hf_dataset_files(folder: Path) -> list[Path] | None:
    """The files of a data set that `datasets` saved in this folder, in order; None where there is none.

    Raises DataError for a folder of several data sets: training on the test set is nobody's wish.
    """
    if (folder / _HF_DICT).is_file():
        parts = sorted(path.parent.name for path in folder.glob(f"*/{_HF_STATE}"))
        raise DataError(
            "a folder holds several data sets",
            where=str(folder),
            why=f"These: {', '.join(parts)}.",
            do=f"Name one of them, such as {folder / (parts or ['train'])[0]}.",
        )
    if not (folder / _HF_STATE).is_file():
        return None
    try:
        state = json.loads((folder / _HF_STATE).read_bytes())
        files = [folder / Path(entry["filename"]).name for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _no_dataset(folder, repr(error)) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise _no_dataset(folder, f"These files are missing: {', '.join(missing[:3])}.")
    return files


def _no_dataset(folder: Path, why: str) -> DataError:
    return DataError(
        "a Hugging Face data set cannot be read",
        where=str(folder),
        why=why,
        do="Save it again: dataset.save_to_disk(folder).",
    )


def _group_bytes(file: SourceFile) -> list[int]:
    with reading_seekable(file.location) as plain:
        metadata = pq.ParquetFile(plain).metadata
        return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]


def _needed_columns(schema: pa.Schema, settings: ReadSettings) -> list[str] | None:
    """Columns to read; None: all, as the message about a missing one lists what there is."""
    wanted = {name.partition(".")[0] for name in settings.wanted}
    if not wanted or not wanted <= set(schema.names):
        return None
    wanted |= {name.partition(".")[0] for name in settings.optional}
    return [name for name in schema.names if name in wanted]


def _records(batches: Any, schema: pa.Schema, location: str, first: int) -> Iterator[Record]:
    named = _class_names(schema)
    row = first
    for batch in batches:
        for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
            for fields in batch.slice(start, _ROWS_AT_ONCE).to_pylist():
                row += 1
                for name, convert in named.items():
                    if name in fields:
                        fields[name] = convert(fields[name])
                yield Record(fields, Where(location, f"row {row}"))


def _class_names(schema: pa.Schema) -> dict[str, Callable[[Any], Any]]:
    """How to turn the numbers of the ClassLabel columns into names."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    converters = {}
    for name, feature in features.items():
        inner = feature.get("feature", feature) if isinstance(feature, dict) else {}
        if isinstance(inner, dict) and inner.get("_type") == "ClassLabel":
            converters[name] = _namer(inner.get("names") or [])
    return converters


def _namer(names: list[str]) -> Callable[[Any], Any]:
    def named(value: Any) -> Any:
        if isinstance(value, list):
            return [named(item) for item in value]
        if not isinstance(value, int) or value < 0:
            return None
        return names[value] if value < len(names) else value

    return named
