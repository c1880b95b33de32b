"""`dist-lm checkpoints` on real checkpoint files: list, verify, prune, copy, and what each refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dist_lm import disk
from dist_lm.checkpoint.manifest import FORMAT, MANIFEST, VERSION, Checkpoint
from dist_lm.checkpoint.store import LocalStore, step_name
from dist_lm.cli import app
from dist_lm.errors import ConfigError, DataError, DistLMError
from dist_lm.run_dir import RunDir
from tests.checkpoint.fragments_by_hand import RUN_ID, save

pytestmark = pytest.mark.fast


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run with checkpoints of steps 1 to 3."""
    run_dir = RunDir(tmp_path / "run")
    run_dir.begin()
    disk.write_json(run_dir.identity, {"run.steps": 3})
    disk.write_bytes(run_dir.path / "run_id", RUN_ID.encode())
    for step in (1, 2, 3):
        save(LocalStore(run_dir.checkpoints), step)
    return run_dir


def dist_lm(verb: str, *given: object) -> Result:
    return CliRunner().invoke(app, ["checkpoints", verb, *map(str, given)])


def refused(done: Result) -> DistLMError:
    assert isinstance(done.exception, DistLMError), done.output
    return done.exception


def spoil(run: RunDir, step: int) -> None:
    file = run.checkpoints / step_name(step) / "rank-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x7f")


def test_checkpoints_are_listed_newest_first(run: RunDir) -> None:
    done = CliRunner().invoke(app, ["checkpoints", "list", str(run.path), "--json"])
    assert [row["step"] for row in json.loads(done.output)] == [3, 2, 1]
    assert [line.split()[1] for line in dist_lm("list", run.path).output.splitlines()] == ["3", "2", "1"]


def test_verify_names_the_damaged_and_those_of_another_run(run: RunDir) -> None:
    done = CliRunner().invoke(app, ["checkpoints", "verify", str(run.path)])
    assert done.output.splitlines() == [f"{step_name(step)}  ok" for step in (3, 2, 1)]
    spoil(run, 2)
    done = dist_lm("verify", run.path)
    assert refused(done).what == "1 checkpoints are damaged"
    assert f"{step_name(2)}  rank-00001.safetensors does not match its SHA-256" in done.output
    disk.write_bytes(run.path / "run_id", b"another")
    assert refused(dist_lm("verify", run.path)).what == "3 checkpoints are damaged"


def test_prune_keeps_the_newest_and_removes_nothing_where_that_is_damaged(run: RunDir) -> None:
    spoil(run, 3)
    error = refused(dist_lm("prune", run.path))
    assert isinstance(error, DataError)
    assert error.what.startswith("the newest checkpoint is damaged")
    assert LocalStore(run.checkpoints).names() == [step_name(3), step_name(2), step_name(1)]
    save(LocalStore(run.checkpoints), 4)
    done = CliRunner().invoke(app, ["checkpoints", "prune", str(run.path), "--keep", "1", "--keep-every", "2"])
    assert done.output == f"removed {step_name(3)}, {step_name(1)}\n"
    assert dist_lm("prune", run.path, "--keep", 2).output == "nothing to remove\n"


def test_a_copy_is_verified_and_nothing_is_copied_over(run: RunDir, tmp_path: Path) -> None:
    backup = tmp_path / "backup"
    done = CliRunner().invoke(app, ["checkpoints", "copy", f"{run.path}@2", str(backup)])
    assert done.exit_code == 0, done.output
    copied = Checkpoint.load(backup / step_name(2))
    assert copied.damage(sorted(copied.files)) == ""
    assert "exists already" in refused(dist_lm("copy", f"{run.path}@2", backup)).what
    spoil(run, 1)
    assert "is damaged" in refused(dist_lm("copy", f"{run.path}@1", backup)).what
    assert "has no checkpoint of step 9" in refused(dist_lm("copy", f"{run.path}@9", backup)).what
    assert "`best` is not a step" in refused(dist_lm("copy", f"{run.path}@best", backup)).what
    assert "is not a run folder" in refused(dist_lm("copy", tmp_path, backup)).what


def test_a_copy_that_the_disk_changed_is_set_aside(
    run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish = LocalStore.publish

    def then_spoil(store: LocalStore, *given: object) -> None:
        publish(store, *given)  # type: ignore[arg-type]
        file = store.root / step_name(3) / "rank-00000.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x7f")

    monkeypatch.setattr(LocalStore, "publish", then_spoil)
    error = refused(dist_lm("copy", run.path, tmp_path / "backup"))
    assert error.what.startswith("the copy at ")
    assert LocalStore(tmp_path / "backup").names() == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "something"}, "is not a checkpoint's manifest"),
        ({"version": VERSION + 1}, "was written by a newer dist_lm"),
        ({"progress": {}}, "does not match its own SHA-256"),
        (None, "cannot be read"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(run: RunDir, change: dict[str, object] | None, words: str) -> None:
    path = run.checkpoints / step_name(3) / MANIFEST
    content = json.loads(path.read_text())
    assert content["format"] == FORMAT
    path.write_text("{" if change is None else json.dumps(content | change))
    assert words in refused(dist_lm("list", run.path)).what
    # Verifying goes through all of them.
    assert isinstance(refused(dist_lm("verify", run.path)), DataError)


def test_runs_are_asked_for_where_there_are_none(run: RunDir, tmp_path: Path) -> None:
    verbs = {"stop": "nobody trains", "tb": "holds no TensorBoard files"}
    for verb, words in verbs.items():
        done = CliRunner().invoke(app, [verb, str(run.path)])
        assert isinstance(done.exception, ConfigError)
        assert words in done.exception.what
