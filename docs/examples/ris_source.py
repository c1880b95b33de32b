"""A format of one's own: RIS, in which libraries and publishers hand out references with their abstracts.

    PYTHONPATH=docs/examples dist-lm data prepare 'refs/*.ris' --format ris_source:Ris --field text=AB \\
        --tokenizer tokenizer --out data --kind tokens

A line is `TAG  - value`; `ER` ends a record.  A tag that comes again adds a line.
"""

import re
from collections.abc import Iterator

from dist_lm.data.sources.format import Format, ReadSettings, Split
from dist_lm.data.sources.lines import decode, lines
from dist_lm.data.sources.record import BadRecords, Record, Where

_LINE = re.compile(r"([A-Z][A-Z0-9])  -(?: (.*))?")


class Ris(Format):
    name = "ris"
    suffixes = (".ris",)

    def read(self, split: Split, settings: ReadSettings, bad: BadRecords) -> Iterator[Record]:
        fields: dict[str, str] = {}
        begin: Where | None = None
        for where, raw in lines(split):
            line = decode(raw, where, bad)
            if line is None or not line.strip():
                continue
            found = _LINE.fullmatch(line.strip())
            if found is None:
                bad.add(where, f"no `TAG  - value`: {line.strip()[:40]!r}")
                continue
            tag, value = found[1], found[2] or ""
            if tag == "ER":
                if begin is not None:
                    yield Record(fields, begin)
                fields, begin = {}, None
                continue
            begin = begin or where
            fields[tag] = f"{fields[tag]}\n{value}" if tag in fields else value
        if begin is not None:
            bad.add(begin, "the record has no ER line")
