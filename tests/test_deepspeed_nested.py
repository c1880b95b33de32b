"""Mistakes inside DeepSpeed's own blocks: only DeepSpeed can find them, and they come back with a line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_lm import deepspeed_keys as keys
from tests.deepspeed_text import FULL_OF_AUTOS, YAML, nested

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).parent.parent
PARTIAL_OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
MISTAKES: dict[str, tuple[dict[str, Any], str, str]] = {
    "a typo": (nested(("zero_optimization", "overlap_com"), True), "did you mean `overlap_comm`?", "(ds.json:3)"),
    "a typo deep inside": (
        nested(("zero_optimization", "offload_optimizer", "devise"), "cpu"),
        "did you mean `device`?",
        "(ds.json:4)",
    ),
    "a typo in bf16": (
        nested(("bf16", "imediate_grad_update"), True),
        "did you mean `immediate_grad_update`?",
        "(ds.json:3)",
    ),
    "a typo in timers": (
        nested(("timers", "throughput", "syncronized"), True),
        "did you mean `synchronized`?",
        "(ds.json:4)",
    ),
    "like no key": (nested(("zero_optimization", "xyzzy"), 1), "unknown DeepSpeed key `xyzzy`", "(ds.json:3)"),
    "a wrong type": (
        nested(("zero_optimization", "reduce_bucket_size"), "large"),
        "DeepSpeed refuses `reduce_bucket_size`",
        "(ds.json:3)",
    ),
    "what DeepSpeed asserts": (PARTIAL_OFFLOAD, "Partial offloading only supported for ZeRO Stage 3", "ds.json"),
    "a dtype": ({"communication_data_type": "fp7"}, "Invalid communication_data_type", "ds.json"),
}
# zenflow is an object: off means absent.
OFF = sorted(keys.REFUSED_IF_ON.keys() - {("zero_optimization", "zenflow")})
FINE: dict[str, tuple[dict[str, Any], list[str]]] = {
    "full of autos": (FULL_OF_AUTOS, ["precision=bf16"]),
    "empty": ({}, []),
    "bf16 at stage 0": ({}, ["precision=bf16", "zero=0"]),
    **{f"{'.'.join(path)} off": (nested(path, False), []) for path in OFF},
}

PROGRAM = """
import json, sys
from dist_lm.deepspeed_config import check_with_deepspeed
from dist_lm.errors import ConfigError
from pathlib import Path
from tests.deepspeed_text import resolved

def answer(settings, ranks, file):
    try:
        check_with_deepspeed(settings, ranks, file=file)
    except ConfigError as error:
        return str(error)
    return "ok"

answers = {}
for name, (values, overrides) in json.load(sys.stdin).items():
    answers[name] = answer(resolved(values, *overrides).settings, 2, Path("ds.json"))
settings = {**resolved({}).settings, "train_batch_size": 64}
for ranks in (2, 3):
    answers[f"{ranks} ranks"] = answer(settings, ranks, None)
print("RESULT " + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What DeepSpeed says to each case; one process, because its import takes seconds."""
    folder = tmp_path_factory.mktemp("nested")
    (folder / "x.yaml").write_text(YAML)
    cases: dict[str, Any] = {name: (values, []) for name, (values, *_) in MISTAKES.items()} | FINE
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(cases),
        cwd=folder,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, str] = json.loads(line.removeprefix("RESULT "))
    return result


@pytest.mark.parametrize("name", MISTAKES)
def test_a_nested_mistake_becomes_a_configuration_error_with_its_line(answers: dict[str, str], name: str) -> None:
    _, words, place = MISTAKES[name]
    assert answers[name].startswith("error[config]")
    assert words in answers[name]
    assert place in answers[name]


@pytest.mark.parametrize("name", FINE)
def test_what_resolves_without_a_mistake_is_taken(answers: dict[str, str], name: str) -> None:
    assert answers[name] == "ok"


def test_the_batch_is_compared_with_the_ranks_of_the_run(answers: dict[str, str]) -> None:
    assert answers["2 ranks"] == "ok"
    assert "micro-batch x accumulation x 3 ranks = 96" in answers["3 ranks"]
