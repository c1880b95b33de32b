"""Plain text: `text` a document.

Memory: one document, which is the whole file unless the user says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_lm.data.sources.files import SourceFile, reading
from dist_lm.data.sources.format import Format, ReadSettings, Split, byte_ranges
from dist_lm.data.sources.lines import decode, lines, without_mark
from dist_lm.data.sources.record import BadRecords, Record, Where


class Text(Format):
    name = "text"
    suffixes = (".txt",)

    def splits(self, file: SourceFile, target_bytes: int, settings: ReadSettings) -> list[Split]:
        if settings.text_documents == "line":
            return byte_ranges(file, self.name, target_bytes)
        return [Split(file.location, self.name)]

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        for where, raw in _documents(split, settings):
            text = decode(raw, where, bad)
            if text is not None:
                yield Record({"text": text}, where)


def _documents(split: Split, settings: ReadSettings) -> Iterator[tuple[Where, bytes]]:
    match settings.text_documents:
        case "file":
            with reading(split.location) as file:
                yield Where(split.location, 1), without_mark(file.read())
        case "line":
            # Blank lines part nothing here, and are no documents.
            yield from ((where, line.rstrip(b"\r\n")) for where, line in lines(split) if line.strip())
        case "paragraph":
            yield from _paragraphs(split)


def _paragraphs(split: Split) -> Iterator[tuple[Where, bytes]]:
    begun: Where | None = None
    pending: list[bytes] = []
    for where, line in lines(split):
        if line.strip():
            begun = begun or where
            pending.append(line)
        elif begun is not None:
            yield begun, b"".join(pending)
            begun, pending = None, []
    if begun is not None:
        yield begun, b"".join(pending)
