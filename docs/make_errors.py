"""docs/errors.md: every kind of error that ends a command, from the classes themselves.

`python docs/make_errors.py` (or `make errors`) writes it; tests/test_error_page.py checks that it is current.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import dist_lm
from dist_lm.errors import EXIT_CRASH, DistLMError

PAGE = Path(__file__).parent / "errors.md"
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
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
