"""A corpus of English prose that every machine has: the documentation inside installed Python packages.

Enters: the standard library and the site-packages of the running interpreter; nothing is imported.
Leaves: one .jsonl file, a line a docstring: {"text", "package", "module", "name"}; and, made from it,
a text classification task (which package is this text about?).
Promises: the same packages give the same file, byte for byte, whatever the number of workers.
"""

from __future__ import annotations

import ast
import gc
import hashlib
import inspect
import json
import os
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dist_lm.data.process_pool import Progress, available_cores, ordered_map, silent
from dist_lm.disk import WholeFile, disk_errors
from dist_lm.errors import DataError

STDLIB = "python-stdlib"
REFERENCE = "python-reference"
MIN_CHARACTERS = 40

# Tests hold code rather than prose; vendored copies would carry the wrong package's name.
_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "site-packages", "dist-packages", "test", "tests", "_vendor", "vendor", "_vendored"}
    | {"third_party", "thirdparty_files", "node_modules", "lib2to3"}
)
_TRIPLE_QUOTES = (b'"""', b"'''")
_CHUNK_BYTES = 1_000_000
# Parsing more than this at once takes gigabytes of memory; such files are generated tables.
_LARGEST_FILE_BYTES = 5_000_000


class SourceFile(NamedTuple):
    """A Python file and what it is called."""

    path: str
    module: str
    package: str
    size: int


class Docstring(NamedTuple):
    text: str
    package: str
    module: str
    name: str
    """Dotted name of the module, class or function that the text belongs to."""


@dataclass(frozen=True)
class CorpusReport:
    """What was collected, and what was not."""

    documents: int
    packages: int
    text_bytes: int
    files_read: int
    files_unparsable: int
    duplicates: int
    documents_of: dict[str, int]
    """Documents of each package, most first."""
    limited: bool
    """The size limit ended the collection."""

    def lines(self) -> list[str]:
        most = ", ".join(f"{name} {count}" for name, count in list(self.documents_of.items())[:6])
        limited = "; stopped at the size limit" if self.limited else ""
        return [
            f"{self.documents} documents, {self.text_bytes / 1e6:.1f} MB, {self.packages} packages{limited}",
            f"files: {self.files_read} read, {self.files_unparsable} of them not parsable",
            f"left out: {self.duplicates} duplicates",
            f"most documents: {most}",
        ]


def write_docs_corpus(
    out: Path,
    *,
    workers: int | None = None,
    limit_mb: float | None = None,
    roots: Sequence[tuple[Path, str | None]] | None = None,
    progress: Progress = silent,
) -> CorpusReport:
    """Write the corpus to `out`, whole or not at all.

    `limit_mb` (of text) stops earlier; which files are read first is decided by a hash of their
    names, so that every package keeps its share.  `roots` are folders with the package that their
    files belong to (None: the folder right below names it); by default those of this interpreter.
    """
    files = sorted({file for root, package in roots or _installed() for file in _python_files(root, package)})
    # The order of reading must not follow the alphabet: a limit would leave the last packages out.
    files.sort(key=lambda file: hashlib.blake2b(file.module.encode(), digest_size=8).digest())
    limit_bytes = None if limit_mb is None else int(limit_mb * 1e6)
    found: list[Docstring] = list(_reference()) if roots is None else []
    seen = {_digest(doc.text) for doc in found}
    text_bytes = sum(len(doc.text.encode()) for doc in found)
    files_read = unparsable = duplicates = 0
    chunks = list(_chunks(files))
    workers = available_cores() if workers is None else workers
    results = ordered_map(_read_chunk, chunks, workers=workers, doing="collecting documentation")
    limited = False
    for chunk, (docs, failed) in zip(chunks, results, strict=False):
        files_read += len(chunk)
        unparsable += failed
        for doc in docs:
            digest = _digest(doc.text)
            if digest in seen:
                duplicates += 1
                continue
            seen.add(digest)
            found.append(doc)
            text_bytes += len(doc.text.encode())
        progress("collecting documentation", files_read, len(files))
        limited = limit_bytes is not None and text_bytes >= limit_bytes
        if limited:
            break
    results.close()
    if not found:
        raise DataError("no documentation was found", do="Install some packages, or name other folders.")
    # Stable: the docstrings of one module stay neighbours, in the order of its text.
    found.sort(key=lambda doc: (doc.package, doc.module))
    _write_lines(out, [doc._asdict() for doc in found])
    counts = Counter(doc.package for doc in found)
    return CorpusReport(
        documents=len(found),
        packages=len(counts),
        text_bytes=text_bytes,
        files_read=files_read,
        files_unparsable=unparsable,
        duplicates=duplicates,
        documents_of=dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        limited=limited,
    )


def docstrings_of(source: bytes, module: str, package: str) -> list[Docstring]:
    """Docstrings of a module's source, cleaned, long ones only.  SyntaxError, ValueError where it is not Python."""
    found = []
    stack: list[tuple[str, ast.AST]] = [(module, ast.parse(source))]
    while stack:
        name, node = stack.pop()
        body: list[ast.stmt] = getattr(node, "body", [])
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = _own_docstring(body)
            if len(text) >= MIN_CHARACTERS:
                found.append(Docstring(text, package, module, name))
        for child in reversed(body):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                stack.append((f"{name}.{child.name}", child))
            elif isinstance(child, ast.If | ast.Try | ast.With):
                stack.append((name, child))
    return found


def _own_docstring(body: list[ast.stmt]) -> str:
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        value = body[0].value.value
        if isinstance(value, str):
            # A lone surrogate, written as an escape, could not be stored as UTF-8.
            return inspect.cleandoc(value).encode("utf-8", "ignore").decode("utf-8").strip()
    return ""


def _read_chunk(files: list[SourceFile]) -> tuple[list[Docstring], int]:
    """Docstrings of some files, and how many could not be parsed.  Runs in a worker."""
    found: list[Docstring] = []
    failed = 0
    collecting = gc.isenabled()
    # A syntax tree is many thousand objects without cycles: collecting them takes as long as parsing.
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for file in files:
                try:
                    source = Path(file.path).read_bytes()
                    if any(quotes in source for quotes in _TRIPLE_QUOTES):
                        found += docstrings_of(source, file.module, file.package)
                except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
                    failed += 1
    finally:
        if collecting:
            gc.enable()
    return found, failed


def _installed() -> list[tuple[Path, str | None]]:
    paths = sysconfig.get_paths()
    packages = {Path(paths["purelib"]).resolve(), Path(paths["platlib"]).resolve()}
    return [(Path(paths["stdlib"]).resolve(), STDLIB), *((path, None) for path in sorted(packages))]


def _python_files(root: Path, package: str | None) -> Iterator[SourceFile]:
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _SKIPPED_FOLDERS and not name.startswith(".")]
        parts = Path(folder).relative_to(root).parts
        for name in names:
            if name.endswith(".py"):
                path = os.path.join(folder, name)
                stem = () if name == "__init__.py" else (name[:-3],)
                module = ".".join(parts + stem)
                size = os.stat(path).st_size
                if module and size <= _LARGEST_FILE_BYTES:
                    yield SourceFile(path, module, package or module.partition(".")[0], size)


def _chunks(files: list[SourceFile]) -> Iterator[list[SourceFile]]:
    chunk: list[SourceFile] = []
    size = 0
    for file in files:
        chunk.append(file)
        size += file.size
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _reference() -> Iterator[Docstring]:
    """The language reference, as the interpreter's own help has it; empty where it is not installed."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for topic in sorted(topics):
        text = inspect.cleandoc(topics[topic]).strip()
        if len(text) >= MIN_CHARACTERS:
            yield Docstring(text, REFERENCE, f"pydoc_data.topics.{topic}", topic)


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def _write_lines(out: Path, lines: Sequence[dict[str, str]]) -> None:
    with disk_errors(out, "write a corpus"):
        out.parent.mkdir(parents=True, exist_ok=True)
        with WholeFile(out) as file:
            for line in lines:
                file.write(json.dumps(line, ensure_ascii=False).encode("utf-8") + b"\n")
