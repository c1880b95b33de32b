"""webdataset shards of .txt or .json samples: members of one key are one record.

Enters: a tar file.  Leaves: a record a sample: `text` from its .txt, the fields of its .json.
Promises: a shard that is cut short or damaged is a DataError.  Python's tar reader is used, as
webdataset's ends such a shard without a word and does not tell where it stopped.  Nothing is
extracted: a member's name is never used as a path.  Memory: one sample.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from dist_lm.data.location import redact
from dist_lm.data.sources.files import reading_seekable
from dist_lm.data.sources.format import Format, ReadSettings, Split
from dist_lm.data.sources.json_lines import json_object
from dist_lm.data.sources.lines import decode
from dist_lm.data.sources.record import BadRecords, Record, Where
from dist_lm.errors import DataError

_LARGEST_MEMBER_BYTES = 1 << 30
_READABLE = ("txt", "json")


class TarSamples(Format):
    name = "webdataset"
    suffixes = (".tar",)

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        with reading_seekable(split.location) as file:
            key: str | None = None
            members: dict[str, bytes] = {}
            for name, content in _members(file, split.location):
                member_key, _, extension = _key_and_extension(name)
                if member_key != key:
                    if key is not None:
                        yield from _record(key, members, split.location, bad)
                    key, members = member_key, {}
                if extension in _READABLE:
                    members[extension] = content
            if key is not None:
                yield from _record(key, members, split.location, bad)


def _key_and_extension(name: str) -> tuple[str, str, str]:
    """As webdataset parts names: at the first dot behind the last slash."""
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    return folder + slash + stem, dot, extension.lower()


def _members(file: BinaryIO, location: str) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                # tarfile remembers every member it has seen.
                archive.members.clear()  # type: ignore[attr-defined]
                if not member.isfile():
                    continue
                if member.size > _LARGEST_MEMBER_BYTES:
                    raise _damaged(location, f"{member.name} says that it has {member.size} bytes.")
                stream = archive.extractfile(member)
                content = stream.read() if stream is not None else b""
                if len(content) != member.size:
                    raise _damaged(location, f"{member.name} ends after {len(content)} of {member.size} bytes.")
                yield member.name, content
            # It takes the first header that it cannot read for the end; the end is a block of zeros.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise _damaged(location, f"There is no end mark at byte {archive.offset}.")
    except tarfile.TarError as error:
        raise _damaged(location, str(error)) from error


def _record(key: str, members: dict[str, bytes], location: str, bad: BadRecords) -> Iterator[Record]:
    where = Where(location, key)
    if not members:
        bad.add(where, f"the sample has no .{' and no .'.join(_READABLE)}")
        return
    fields: dict[str, Any] = {}
    for extension, content in sorted(members.items()):
        text = decode(content, where, bad)
        part = {"text": text} if extension == "txt" and text is not None else None
        if extension == "json" and text is not None:
            part = json_object(text, where, bad)
        if part is None:
            return
        fields |= part
    yield Record(fields, where)


def _damaged(location: str, why: str) -> DataError:
    return DataError("a tar file is damaged", where=redact(location), why=why, do="Copy or make the file again.")
