"""The verbs `dist-lm data corpus ...`: text that every machine has.

Enters: a command line.  Leaves: files, and lines of progress.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

_PROGRESS_S = 3.0
corpus_app = typer.Typer(
    help="Corpora that every machine has.\n\n"
    "dist-lm data corpus docs --out corpus.jsonl\n\n"
    "dist-lm data corpus docs --out small.jsonl --limit-mb 5\n\n"
    "dist-lm data corpus packages corpus.jsonl --out packages.jsonl",
    no_args_is_help=True,
)


@corpus_app.command("docs")
def corpus_docs(
    out: Annotated[Path, typer.Option(help="File to write, such as corpus.jsonl.")],
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    limit_mb: Annotated[float, typer.Option(help="Stop after this much text; 0: take all.")] = 0.0,
) -> None:
    """Docstrings of the standard library and the installed packages, labelled by package.

    dist-lm data corpus docs --out corpus.jsonl

    dist-lm data corpus docs --out small.jsonl --limit-mb 5

    dist-lm data corpus docs --out corpus.jsonl --workers 8
    """
    from dist_lm.data.corpus_docs import write_docs_corpus

    report = write_docs_corpus(out, workers=workers, limit_mb=limit_mb or None, progress=counter())
    print("\n".join([f"{out}:", *report.lines()]))


@corpus_app.command("packages")
def corpus_packages(
    corpus: Annotated[Path, typer.Argument(help="File of `data corpus docs`.")],
    out: Annotated[Path, typer.Option(help="File to write.")],
    packages: Annotated[int, typer.Option(help="Number of classes.")] = 10,
    per_package: Annotated[int, typer.Option(help="Texts of each class.")] = 400,
) -> None:
    """A classification task: which package is a docstring about?

    dist-lm data corpus packages corpus.jsonl --out packages.jsonl

    dist-lm data corpus packages corpus.jsonl --out five.jsonl --packages 5

    dist-lm data corpus packages corpus.jsonl --out large.jsonl --per-package 2000
    """
    from dist_lm.data.package_task import write_package_task

    counts = write_package_task(corpus, out, packages=packages, per_package=per_package)
    print(f"{out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def counter() -> Callable[[str, int, int | None], None]:
    """Progress of long stages: a line every few seconds, so that logs stay readable."""
    told_at = time.monotonic()

    def tell(stage: str, done: int, total: int | None) -> None:
        nonlocal told_at
        if time.monotonic() - told_at > _PROGRESS_S:
            told_at = time.monotonic()
            print(f"{stage}: {done}" + (f" of {total}" if total else ""), flush=True)

    return tell
