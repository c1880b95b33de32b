"""docs/configuration.md and docs/commands.md: every key of a YAML and every verb, from the code itself.

`python docs/make_reference.py` (or `make reference`) writes them; tests/test_pages.py checks that they are current.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from dist_lm.cli import app
from dist_lm.config_files import schema

DOCS = Path(__file__).parent
CONFIGURATION = """# Configuration

Made by `make reference` from the schema that checks a YAML (`dist-lm config schema` prints it for editors). A key
without a default has to be given. `dist-lm config show -c X` prints the value of each with where it comes from; keys
are set on the command line as `optim.lr=1e-4`. What belongs together is told in [objectives.md](objectives.md),
[tasks.md](tasks.md), [data-order.md](data-order.md), [faults.md](faults.md) and [cluster.md](cluster.md).
"""
COMMANDS = """# Commands

Made by `make reference` from the verbs themselves: what `--help` says.
"""
# What the first example of a verb needs that a test of the pages does not have (tests/page_blocks.py).
MARKS = {
    "data corpus docs": "needs: minutes",
    "data corpus packages": "needs: minutes",
    "demo": "needs: minutes",
    "doctor": "make soak",
    "eval": "make soak",
    "job logs": "needs: a Ray cluster",
    "job resume": "needs: a Ray cluster",
    "job status": "needs: a Ray cluster",
    "job stop": "needs: a Ray cluster",
    "predict": "make soak",
    "stop": "needs: a run that goes on",
    "submit": "needs: a Ray cluster",
    "tb": "needs: somebody who ends it",
    "train": "needs: minutes",
}


def configuration() -> str:
    """Markdown: a table a section."""
    whole = schema()
    parts = [CONFIGURATION]
    for title, section in _sections(whole, "", whole):
        rows = [_row(name, facts, whole, section) for name, facts in section["properties"].items()]
        lines = [row for row in rows if row]
        if lines:
            head = "| key | values | default | |\n|---|---|---|---|"
            parts.append(f"## {title}\n\n{head}\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _sections(facts: dict[str, Any], path: str, whole: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The section itself, then those inside it; variants of a section are told apart by their names."""
    yield path or "The whole", facts
    for name, inner in facts["properties"].items():
        variants = list(_inner(inner, whole))
        for variant in variants:
            named = variant["properties"].get("name", {}) if len(variants) > 1 else {}
            chosen = named.get("const") or " or ".join(named.get("enum", []))
            place = f"{path}.{name}" if path else name
            yield from _sections(variant, f"{place}: {{name: {chosen}}}" if chosen else place, whole)


def _inner(facts: dict[str, Any], whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The sections that a key may hold."""
    if "$ref" in facts:
        found = whole["$defs"][facts["$ref"].rpartition("/")[2]]
        if "properties" in found:
            yield found
    for part in [*facts.get("anyOf", []), *facts.get("oneOf", []), *([facts["items"]] if "items" in facts else [])]:
        if isinstance(part, dict):
            yield from _inner(part, whole)


def _row(name: str, facts: dict[str, Any], whole: dict[str, Any], section: dict[str, Any]) -> str:
    """A line of the table; empty for a key that is a section of its own."""
    if any(True for _ in _inner(facts, whole)) and "description" not in facts:
        return ""
    default = "" if name in section.get("required", []) else f"`{_value(facts.get('default'))}`"
    cells = (f"`{name}`", _values(facts), default, facts.get("description", ""))
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def _values(facts: dict[str, Any]) -> str:
    """What may stand there, in words."""
    if "$ref" in facts:
        return "a section"
    if "const" in facts:
        return f"`{_value(facts['const'])}`"
    if "enum" in facts:
        return ", ".join(f"`{_value(value)}`" for value in facts["enum"])
    for several in ("anyOf", "oneOf"):
        if several in facts:
            return " or ".join(dict.fromkeys(_values(part) for part in facts[several]))
    if facts.get("type") == "array":
        return f"list of {_values(facts['items'])}" if facts.get("items") else "list"
    words = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    limits = [f"{words} {facts[bound]:g}" for bound, words in bounds.items() if bound in facts and facts[bound] < 1e15]
    return " ".join([words.get(facts.get("type", ""), facts.get("type", "any value")), *limits]).replace(
        "null", "nothing"
    )


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def commands() -> str:
    """Markdown: what each verb does, its examples and options."""
    return "\n".join([COMMANDS, *_verbs(typer.main.get_command(app), [])])


def _verbs(command: Any, words: list[str]) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        yield _verb(command, words)
    for name in sorted(inner):
        yield from _verbs(inner[name], [*words, name])


def _verb(command: Any, words: list[str]) -> str:
    help_text = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help)
    paragraphs = [" ".join(part.split()) for part in help_text.split("\n\n")]
    examples = [part for part in paragraphs if re.match(r"(?:[A-Z_]+=\S+ |watch \S+ \S+ )*dist-lm ", part)]
    told = [part for part in paragraphs if part not in examples]
    rows = []
    for parameter in command.params:
        if parameter.name in ("help", "install_completion", "show_completion"):
            continue
        option = parameter.param_type_name == "option"
        name = ", ".join(parameter.opts) if option else (parameter.metavar or parameter.name).strip("[]").upper()
        default = "" if parameter.required or callable(parameter.default) else _value(_plain(parameter.default))
        shown = f"`{default}`" if option and default not in ("null", "", "false") else ""
        cells = (f"`{name}`", shown, " ".join((getattr(parameter, "help", "") or "").split()).replace("|", "\\|"))
        rows.append(f"| {' | '.join(cells)} |")
    table = "\n\n| | default | |\n|---|---|---|\n" + "\n".join(rows) if rows else ""
    blocks = "\n".join(examples)
    verb = " ".join(words)
    mark = f"<!-- {MARKS[verb]} -->\n" if verb in MARKS else ""
    return f"## dist-lm {verb}\n\n" + "\n\n".join(told) + f"\n\n{mark}```sh\n{blocks}\n```{table}\n"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


PAGES = {"configuration.md": configuration, "commands.md": commands}

if __name__ == "__main__":
    for file, made in PAGES.items():
        (DOCS / file).write_text(made(), encoding="utf-8")
