"""docs/errors.md: every kind of error that ends a command, from the classes themselves, and every message.

`python docs/make_errors.py` (or `make errors`) writes it; tests/test_error_page.py checks that it is current.
"""

from __future__ import annotations

import ast
import importlib
import json
from dataclasses import dataclass
from pathlib import Path

import dist_lm
from dist_lm.errors import EXIT_CRASH, DistLMError

PAGE = Path(__file__).parent / "errors.md"
REPRODUCED = Path(__file__).parents[1] / "tests" / "reproduced_errors.json"
# Class: what helps in general (the message of each error says what helps with it), the test that reproduces it.
KINDS = {
    "ConfigError": (
        "Correct the key or flag in the file and line that the message names; `dist-lm config check -c X`.",
        "tests/test_cli.py::test_an_unknown_key_ends_with_code_2_and_its_line",
    ),
    "DataError": (
        "Prepare or copy the data anew; `dist-lm data verify FOLDER`, `dist-lm doctor -c X --data`.",
        "tests/doctor/test_doctor_verb.py::test_data_that_do_not_fit_the_configuration_are_told",
    ),
    "DamagedData": (
        "Copy the shard again, or let `data.on_damage: substitute` replace its blocks.",
        "tests/data/test_damage.py::test_damage_tells_its_place_through_the_stream_and_across_processes",
    ),
    "TooManyBad": (
        "Correct the records that are listed, or raise `--max-bad`.",
        "tests/data/sources/test_formats.py::test_the_first_bad_records_are_shown_and_all_are_counted",
    ),
    "RunCrashed": (
        "The message of the first rank and its traceback in `errors/`; the same call goes on.",
        "tests/examples/test_examples.py::test_training_runs_from_python_and_goes_on_after_a_crash",
    ),
    "EnvironmentFault": (
        "`dist-lm doctor -c X` names what the machine or the cluster lacks.",
        "tests/faults/test_runs.py::test_a_full_disk_of_one_rank_ends_all_and_publishes_nothing",
    ),
    "Fenced": (
        "Nothing: a later attempt trains the run; end the old process.",
        "tests/faults/test_lease.py::test_a_late_process_of_an_earlier_attempt_is_refused",
    ),
    "OutOfMemory": (
        "A smaller batch.micro, a higher zero, bf16, offload; `dist-lm plan -c X` says what fits.",
        "tests/faults/test_runs.py::test_out_of_memory_tells_numbers_and_options",
    ),
    "OutOfMemoryRetry": (
        "Nothing: the launcher starts again with half the micro-batch.",
        "tests/faults/test_runs.py::test_out_of_memory_tells_numbers_and_options",
    ),
    "Stalled": (
        "Look at the stacks and collectives in `errors/`; the launcher starts again.",
        "tests/faults/test_kills.py::test_a_frozen_rank_is_recognised_and_the_run_goes_on",
    ),
    "Diverged": (
        "A lower optim.lr, a longer warm-up, optim.clip; look at the data of the steps that are named.",
        "tests/faults/test_runs.py::test_a_run_without_a_way_back_ends_with_exit_code_7",
    ),
    "StopRequested": (
        "Run the same command again.",
        "tests/faults/test_stop_while_waiting.py::test_a_stop_while_a_server_hangs_saves_and_ends_with_75",
    ),
}


def error_classes() -> list[type[DistLMError]]:
    """Every class of error, by exit code.  Only the modules that define one are imported."""
    package = Path(dist_lm.__file__).parent
    waiting = [
        (module, node)
        for module in sorted(package.rglob("*.py"))
        for node in ast.parse(module.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    ]
    names, before = {DistLMError.__name__}, 0
    found = []
    while len(names) > before:
        before = len(names)
        for module, node in waiting:
            if node.name not in names and names & {getattr(base, "id", "") for base in node.bases}:
                names.add(node.name)
                path = module.relative_to(package.parent).with_suffix("")
                found.append(getattr(importlib.import_module(".".join(path.parts)), node.name))
    return sorted(found, key=lambda error: (error.exit_code, len(error.__mro__), error.__name__))


@dataclass(frozen=True)
class Site:
    """A place where dist_lm makes an error."""

    module: str
    first_line: int
    last_line: int
    error: str
    what: str
    """The message; `{...}` stands for what it fills in."""
    do: str


def sites() -> list[Site]:
    """In the order of the files."""
    names = {error.__name__ for error in error_classes()}
    package = Path(dist_lm.__file__).parent
    found = []
    for module in sorted(package.rglob("*.py")):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        # What only makes an error of another process anew says nothing of its own.
        copied = {
            id(call)
            for function in ast.walk(tree)
            if isinstance(function, ast.FunctionDef) and function.name == "_rebuild"
            for call in ast.walk(function)
        }
        calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in copied)
        for call in sorted(calls, key=lambda call: call.lineno):
            error = getattr(call.func, "id", "")
            if error in names and call.args:
                do = next((_template(_meant(word.value, tree)) for word in call.keywords if word.arg == "do"), "")
                name = str(module.relative_to(package.parent))
                last_line = call.end_lineno or call.lineno
                what = _template(_meant(call.args[0], tree))
                found.append(Site(name, call.lineno, last_line, error, what, do))
    return found


def _meant(node: ast.expr, tree: ast.Module) -> ast.expr:
    """What a name stands for, where its function or its module gave it one value; else the node itself."""
    if not isinstance(node, ast.Name):
        return node
    functions = [function for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)]
    around = [one for one in functions if one.lineno <= node.lineno <= (one.end_lineno or 0)]
    for scope in (*reversed(around), tree):
        inside = ast.walk(scope) if isinstance(scope, ast.FunctionDef) else scope.body
        given = [
            one.value
            for one in inside
            if isinstance(one, ast.Assign) and any(isinstance(to, ast.Name) and to.id == node.id for to in one.targets)
        ]
        if given:
            return given[0] if len(given) == 1 else node
    return node


def _template(node: ast.expr) -> str:
    """Words as they stand in the code, without what they are filled with."""
    return " ".join(_raw(node).split())


def _raw(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_raw(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _raw(node.left) + _raw(node.right)
    return "{...}"


def _messages() -> str:
    """A table a module."""
    reproduced = json.loads(REPRODUCED.read_text(encoding="utf-8"))
    rows: dict[str, dict[str, None]] = {}
    for site in sites():
        test = reproduced[site.module][site.what]
        cells = (f"`{site.error}`", _cell(site.what), _cell(site.do), f"`{test}`" if "::" in test else test)
        rows.setdefault(site.module, {})[f"| {' | '.join(cells)} |"] = None
    head = "| class | message | what it says to do | reproduced by |\n|---|---|---|---|"
    return "\n\n".join(f"### {module}\n\n{head}\n" + "\n".join(lines) for module, lines in rows.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """Markdown."""
    rows = []
    for error in error_classes():
        remedy, test = KINDS[error.__name__]
        meaning = " ".join((error.__doc__ or "").split())
        again = "yes" if error.restart_helps else "no"
        rows.append(f"| {error.exit_code} | `{error.kind}` | {meaning} | {again} | {remedy} | `{test}` |")
    table = "\n".join(rows)
    return f"""# Errors

Made by `make errors` from the classes of `dist_lm/errors.py`.  A message says what, where, why and what to do, in at
most eight lines that begin with `error[KIND]`; the traceback of a run's error is in the run folder, `errors/`.  Exit
codes are the same under every launcher.  Code {EXIT_CRASH} is a crash that nobody foresaw; the launcher starts again.

| code | kind | meaning | does a restart help? | remedy | reproduced by |
|---|---|---|---|---|---|
{table}

## Every message

`{{...}}` stands for what a message fills in.  Which test makes which message is noted while the tests run
(`tests/recorded_errors.py`): a test that passes without making the message that it is named for here fails its session.

{_messages()}
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
