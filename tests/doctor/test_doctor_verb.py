"""`dist-lm doctor`: a configuration and its data, exit codes, JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_lm.doctor.doctor import Wanted, examine
from dist_lm.doctor.finding import Finding
from dist_lm.doctor.run_settings import check_data, check_data_bytes
from tests.recipe_text import write_recipe
from tests.test_cli import dist_lm

RECIPE = """\
task: {name: mlm}
model: {size: tiny}
data: {train: DATA/pairs/train, heldout: DATA/pairs/heldout, tokenizer: DATA/tokenizer}
batch: {global: 16, micro: 8}
optim: {lr: 1e-3}
run: {dir: RUN, steps: 20}
"""


def recipe(folder: Path, data: Path) -> Path:
    return write_recipe(folder, RECIPE.replace("DATA", str(data)).replace("RUN", str(folder / "run")))


def config_of(path: Path, *overrides: str):  # type: ignore[no-untyped-def]
    from dist_lm.deepspeed_config import load_run

    return load_run(path, overrides).config


def test_the_verb_tells_a_good_run_as_json_and_leaves_no_trace(tmp_path: Path, topics_data: Path) -> None:
    done = dist_lm("doctor", "-c", recipe(tmp_path, topics_data), "--data", "--json")
    found = {entry["check"]: entry for entry in json.loads(done.stdout)}
    assert done.returncode == 0, done.stdout
    assert {"versions", "configuration", "run folder", "data", "collectives"} <= set(found)
    assert "verified" in found["data"]["what"]
    assert [entry for entry in found.values() if entry["level"] == "fail"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_wrong_configuration_ends_with_code_2_and_does_not_hide_the_machine(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_recipe(tmp_path)
    path.write_text(path.read_text().replace("  lr:", "  learning_rate:"))
    found: list[Finding] = []
    for finding in examine(Wanted(path)):
        found.append(finding)
        if finding.check == "disk":
            # What follows imports torch and starts ranks; the verb's own test has it.
            break
    wrong = [finding for finding in found if finding.level == "fail"]
    assert [finding.exit_code for finding in wrong] == [2]
    assert "unknown key `optim.learning_rate`" in wrong[0].what
    assert "versions" in {finding.check for finding in found}


def test_data_that_do_not_fit_the_configuration_are_told(tmp_path: Path, topics_data: Path) -> None:
    path = recipe(tmp_path, topics_data)
    (good,) = check_data(config_of(path))
    assert good.level == "ok"
    for override, words in {
        "task={name: classification}": "reads data of kind `classification`",
        "data.train=nowhere": "nowhere",
        "batch.global=1000000": "smaller than one global batch",
    }.items():
        (finding,) = check_data(config_of(path, override))
        assert finding.level == "fail"
        assert words in finding.what
        assert finding.exit_code == 3
        assert finding.do


def test_a_flipped_byte_is_found_with_data(tmp_path: Path, topics_data: Path) -> None:
    import shutil

    copy = tmp_path / "data"
    shutil.copytree(topics_data, copy)
    shard = sorted((copy / "pairs" / "train").glob("*.tar"))[0]
    content = bytearray(shard.read_bytes())
    content[5000] ^= 1
    shard.write_bytes(content)
    levels = [finding.level for finding in check_data_bytes(config_of(recipe(tmp_path, copy)))]
    assert levels == ["fail", "ok"]
