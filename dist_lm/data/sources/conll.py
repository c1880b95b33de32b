"""CoNLL files: a token and its tags a line, a blank line behind each sentence.

Enters: lines of columns parted by blanks or tabs.  Leaves: records of `tokens` and `tags`.
Lines that begin with "-DOCSTART-" or "# " are no tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

from dist_lm.data.sources.format import Format, ReadSettings, Split
from dist_lm.data.sources.lines import decode, lines
from dist_lm.data.sources.record import BadRecords, Record, Where

_NO_TOKENS = ("-DOCSTART-", "# ")


class Conll(Format):
    name = "conll"
    suffixes = (".conll", ".iob", ".iob2", ".bio")

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        sentence = _Sentence()
        for where, raw in lines(split):
            line = decode(raw, where, bad)
            if line is None:
                sentence.damaged = True
            elif not line.strip():
                if sentence.where is not None:
                    yield from sentence.record()
                sentence = _Sentence()
            elif not line.startswith(_NO_TOKENS):
                sentence.add(line, where, settings, bad)
        if sentence.where is not None:
            yield from sentence.record()


class _Sentence:
    """The sentence being read; one with a bad line is reported once and gives no record."""

    def __init__(self) -> None:
        self.where: Where | None = None
        self.damaged = False
        self._tokens: list[str] = []
        self._tags: list[str] = []

    def add(self, line: str, where: Where, settings: ReadSettings, bad: BadRecords) -> None:
        self.where = self.where or where
        columns = line.split("\t") if "\t" in line else line.split()
        columns = [column.strip() for column in columns]
        try:
            token, tag = columns[settings.tokens_column], columns[settings.tags_column]
        except IndexError:
            token = tag = ""
        if len(columns) < 2 or not token or not tag:
            if not self.damaged:
                bad.add(where, f"no token and tag in {len(columns)} column(s): {line.strip()[:40]!r}")
            self.damaged = True
            return
        self._tokens.append(token)
        self._tags.append(tag)

    def record(self) -> Iterator[Record]:
        if not self.damaged and self.where is not None:
            yield Record({"tokens": self._tokens, "tags": self._tags}, self.where)
