"""A run folder belongs to one run, and counts its attempts."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config_files import identity, identity_diff, load_config
from dist_lm.errors import ConfigError, EnvironmentFault
from dist_lm.run_dir import RunDir, check_space
from tests.recipe_text import write_recipe

pytestmark = pytest.mark.fast


def identity_of(folder: Path, *overrides: str) -> dict[str, Any]:
    return identity(load_config(write_recipe(folder), overrides).config)


def claim(run: RunDir, new: dict[str, Any], *allow: str) -> None:
    run.claim(new, partial(identity_diff, new=new, allow=allow))


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "runs" / "one")


def contents(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_a_new_folder_is_claimed_and_the_same_run_may_come_back(tmp_path: Path, run: RunDir) -> None:
    mine = identity_of(tmp_path)
    claim(run, mine)
    assert {path.name for path in run.path.iterdir()} == {
        "checkpoints",
        "attempts",
        "logs",
        "errors",
        "model",
        "identity.json",
    }
    claim(run, mine)
    claim(run, identity_of(tmp_path, "batch.micro=4", "zero=3", "run.dir=elsewhere"))


def test_another_configuration_is_refused_before_anything_is_touched(tmp_path: Path, run: RunDir) -> None:
    claim(run, identity_of(tmp_path))
    before = run.identity.read_bytes()
    with pytest.raises(ConfigError) as caught:
        claim(run, identity_of(tmp_path, "optim.lr=0.5"))
    assert str(run.path) in caught.value.what
    assert caught.value.why == "optim.lr: 0.0001 -> 0.5"
    assert "run.allow_change" in caught.value.do
    assert run.identity.read_bytes() == before


def test_a_change_that_is_allowed_becomes_the_new_identity(tmp_path: Path, run: RunDir) -> None:
    old, new = identity_of(tmp_path), identity_of(tmp_path, "optim.lr=0.5")
    claim(run, old)
    claim(run, new, "optim.lr")
    claim(run, new)
    with pytest.raises(ConfigError, match=r"optim.lr: 0.5 -> 0.0001") as caught:
        claim(run, old)
    assert caught.value.exit_code == 2


def test_many_differences_are_counted(tmp_path: Path, run: RunDir) -> None:
    claim(run, {f"key{number}": 0 for number in range(7)})
    with pytest.raises(ConfigError) as caught:
        claim(run, {f"key{number}": 1 for number in range(7)})
    assert "... and 3 more" in str(caught.value)


def test_a_folder_with_other_files_is_refused_and_left_as_it_is(tmp_path: Path, run: RunDir) -> None:
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and is not a run folder"):
        claim(run, identity_of(tmp_path))
    assert contents(run.path) == {"thesis.tex"}


def test_logs_that_the_launcher_put_there_are_no_strangers(tmp_path: Path, run: RunDir) -> None:
    run.logs.mkdir(parents=True)
    (run.logs / "rank-00000.txt").write_text("starting\n")
    claim(run, identity_of(tmp_path))
    assert run.identity.is_file()


def test_a_file_where_the_folder_should_be_is_refused(tmp_path: Path, run: RunDir) -> None:
    run.path.parent.mkdir()
    run.path.write_text("a file")
    with pytest.raises(ConfigError):
        claim(run, identity_of(tmp_path))
    assert run.path.read_text() == "a file"


def test_a_file_above_the_folder_is_named(tmp_path: Path, run: RunDir) -> None:
    run.path.parent.write_text("a file")
    with pytest.raises(ConfigError, match="is a file"):
        claim(run, identity_of(tmp_path))


def test_attempts_are_numbered_and_keep_how_they_began_and_ended(run: RunDir) -> None:
    run.begin()
    first = run.open_attempt({"world_size": 2, "from_step": 0})
    second = run.open_attempt({"world_size": 4, "from_step": 50})
    assert (first, second) == (1, 2)
    run.close_attempt(first, reason="killed", step=50)
    facts = run.attempt_facts(first)
    assert (facts["attempt"], facts["world_size"], facts["from_step"]) == (1, 2, 0)
    assert (facts["reason"], facts["step"]) == ("killed", 50)
    assert facts["began_at"] <= facts["ended_at"]
    assert "ended_at" not in run.attempt_facts(second)
    assert RunDir(run.path).open_attempt({}) == 3


def test_a_traceback_is_kept_for_each_attempt_and_rank(run: RunDir) -> None:
    written = {run.write_error(attempt, rank, f"{attempt} {rank}") for attempt in (1, 2) for rank in (0, 1)}
    assert len(written) == 4
    assert run.write_error(2, 1, "Traceback").read_text() == "Traceback"


def test_too_little_space_is_told_before_it_is_needed(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(EnvironmentFault) as caught:
        check_space(tmp_path, 2**62)
    assert str(tmp_path) in str(caught.value)
    assert "run.dir" in caught.value.do
