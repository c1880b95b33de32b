"""Code blocks of the pages: which hold commands, and what is asked of a machine that runs them.

Enters: README.md and docs/*.md.  Leaves: Blocks.
A block of commands begins with ```sh.  A test runs it as it stands, unless the line before it says why none does
(`<!-- needs: a Ray cluster -->`) or that `make soak` does (`<!-- make soak -->`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import typer

from dist_lm.cli import app

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = sorted((REPOSITORY / "docs").glob("*.md"))
SHELL, SOAK, NEEDS = "sh", "make soak", "needs: "
_BLOCK = re.compile(r"(?:^<!-- ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """What stands between two fences."""

    page: str
    number: int
    """From 1 on, in its page."""
    language: str
    mark: str
    """The comment in the line before it; empty where there is none."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.number}"

    @property
    def commands(self) -> list[str]:
        """Lines, those that go on in the next one as one."""
        return re.sub(r"\s*\\\n\s*", " ", self.text).splitlines()


def blocks() -> Iterator[Block]:
    """Of all pages, the README first."""
    for page in (REPOSITORY / "README.md", *PAGES):
        for number, (mark, language, text) in enumerate(_BLOCK.findall(page.read_text()), 1):
            yield Block(page.name, number, language, mark, text)


def verb_of(words: list[str]) -> tuple[list[str], typer.core.TyperCommand, list[str]]:
    """The verb, its parser, and what it is given."""
    command, verb, given = typer.main.get_command(app), [], list(words)
    while given and given[0] in getattr(command, "commands", {}):
        command = command.commands[given[0]]  # type: ignore[attr-defined]
        verb.append(given.pop(0))
    return verb, command, given  # type: ignore[return-value]
