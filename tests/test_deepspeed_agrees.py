"""What the installed DeepSpeed reads and refuses: our lists of its keys, and our shipped files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parent.parent

PROGRAM = """
import json, sys
from pathlib import Path
from deepspeed.runtime.config import DeepSpeedConfig
from dist_lm import deepspeed_keys as keys
from dist_lm.deepspeed_config import check_with_deepspeed, load_run, resolve
from dist_lm.errors import ConfigError
from tests.recipe_text import write_deepspeed, write_recipe

folder, read = Path(sys.argv[1]), set()

class Recorder(dict):
    "Notes every key that is asked for, also inside."
    def __init__(self, values, path=()):
        super().__init__({k: Recorder(v, (*path, k)) if isinstance(v, dict) else v for k, v in values.items()})
        self.path = path
    def get(self, key, default=None):
        read.add((*self.path, key))
        return super().get(key, default)
    def __getitem__(self, key):
        read.add((*self.path, key))
        return super().__getitem__(key)
    def __contains__(self, key):
        read.add((*self.path, key))
        return super().__contains__(key)
    def __copy__(self):
        return self

blocks = {path[0]: {} for path in keys.UNCHECKED}
DeepSpeedConfig(Recorder({"train_micro_batch_size_per_gpu": 2, **blocks}))

def answer(values):
    path = write_deepspeed(folder, values)
    loaded = load_run(write_recipe(folder), [f"deepspeed={path}"])
    resolved = resolve(loaded.config, world_size=2, micro_rows=8, micro_steps=4, hidden_size=128,
                       source_of=loaded.origins)
    try:
        check_with_deepspeed(resolved.settings, 2, file=path)
    except ConfigError as error:
        return str(error)
    return "ok"

answers = {}
for shipped in sorted(Path("ds_configs").glob("*.json")):
    answers[shipped.stem] = answer(json.loads(shipped.read_text().replace("SET_ME", str(folder))))
answers["typo"] = answer({"zero_optimization": {"stage": 2, "overlap_com": True}})
answers["type"] = answer({"zero_optimization": {"stage": 2, "reduce_bucket_size": "large"}})
print("RESULT " + json.dumps({"read": sorted(map(list, read)), "answers": answers}))
"""


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the installed DeepSpeed says; one process, because its import takes seconds."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path_factory.mktemp("deepspeed"))],
        cwd=REPOSITORY,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    result["read"] = {tuple(path) for path in result["read"]}
    return result


def test_deepspeed_parses_every_shipped_file_once_it_is_resolved(deepspeed: dict[str, Any]) -> None:
    stems = {path.stem for path in (REPOSITORY / "ds_configs").glob("*.json")}
    assert stems >= {"zero1", "zero2", "zero3", "zero3_nvme"}
    assert {stem: deepspeed["answers"][stem] for stem in stems} == dict.fromkeys(stems, "ok")


def test_a_nested_typo_and_a_wrong_type_come_back_with_file_and_line(deepspeed: dict[str, Any]) -> None:
    assert "unknown DeepSpeed key `overlap_com`" in deepspeed["answers"]["typo"]
    assert "deepspeed.json:4" in deepspeed["answers"]["typo"]
    assert "DeepSpeed refuses `reduce_bucket_size`" in deepspeed["answers"]["type"]
    assert "deepspeed.json:4" in deepspeed["answers"]["type"]


def test_our_list_of_top_level_keys_is_the_one_that_deepspeed_reads(deepspeed: dict[str, Any]) -> None:
    from dist_lm.deepspeed_keys import DEEPSPEED_OWNED, DERIVED, OWNED_BY_YAML, REFUSED

    read = {path[0] for path in deepspeed["read"] if len(path) == 1}
    passed = DEEPSPEED_OWNED | {path[0] for path in OWNED_BY_YAML} | {DERIVED[0]}
    assert read - passed - set(REFUSED) == set(), "DeepSpeed reads keys that nobody here has thought about"
    assert passed - read == set(), "these would be ignored without a word"


def test_our_lists_of_keys_in_unchecked_blocks_are_those_that_deepspeed_reads(deepspeed: dict[str, Any]) -> None:
    from dist_lm.deepspeed_keys import UNCHECKED

    # The optimizer never reaches DeepSpeed: its keys are ours.
    blocks = {block: known for block, known in UNCHECKED.items() if block[0] != "optimizer"}
    found = {block: {path[-1] for path in deepspeed["read"] if path[:-1] == block} for block in blocks}
    assert found == {block: set(known) for block, known in blocks.items()}
