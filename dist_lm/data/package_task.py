"""A classification task from the documentation corpus: which package is this text about?

Enters: the corpus of corpus_docs.  Leaves: a .jsonl file of {"text", "label"}.
Promises: as many texts of each package; the packages' own names are taken out of the texts, so that
the language has to give the answer; the same corpus gives the same file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from pathlib import Path

from dist_lm.disk import disk_errors, write_bytes
from dist_lm.errors import DataError

_MIN_CHARACTERS = 80
_STAND_IN = "package"


def write_package_task(corpus: Path, out: Path, *, packages: int = 10, per_package: int = 400) -> dict[str, int]:
    """Texts of the packages with the most documents; returns the number of texts of each.

    Raises DataError where the corpus is missing, no corpus of ours, or has too few packages.
    """
    texts: dict[str, list[str]] = defaultdict(list)
    with disk_errors(corpus, "read the corpus"), corpus.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
                text, package = record["text"], record["package"]
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    "this is not a documentation corpus",
                    where=f"{corpus}:{number}",
                    why=repr(error),
                    do="Make one with `dist-lm data corpus docs`.",
                ) from error
            if len(text) >= _MIN_CHARACTERS:
                texts[package].append(text)
    ranked = sorted(texts, key=lambda name: (-len(texts[name]), name))[:packages]
    if len(ranked) < 2:
        raise DataError(
            f"the corpus is about {len(ranked)} package(s)",
            where=str(corpus),
            why="A classifier needs at least two.",
            do="Collect the corpus on a machine with more packages installed.",
        )
    count = min(per_package, len(texts[ranked[-1]]))
    # Names of all packages: one package's text may well name another, and that is not the language either.
    names = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in ranked), re.IGNORECASE)
    lines = []
    for package in ranked:
        for text in sorted(texts[package], key=_draw)[:count]:
            lines.append({"text": names.sub(_STAND_IN, text), "label": package})
    lines.sort(key=lambda line: _draw(line["text"]))
    write_bytes(out, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return dict.fromkeys(ranked, count)


def _draw(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()
