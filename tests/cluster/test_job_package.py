"""What goes with a job is measured before it is sent; addresses and places that cannot work are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import create_package
from typer.testing import CliRunner

from dist_lm.cli import app
from dist_lm.cluster.job_package import EXCLUDES, LIMIT_BYTES, check_package, entry_sizes
from dist_lm.cluster.jobs import Job, Jobs, entrypoint, require_shared_run_dir
from dist_lm.cluster.local import free_port
from dist_lm.config_files import load_config
from dist_lm.errors import ConfigError, EnvironmentFault
from tests.recipe_text import RECIPE

MIB = 2**20


def write(path: Path, size: int) -> None:
    """A file of `size` bytes, which takes no space on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def test_ignored_files_and_git_are_not_sent(tmp_path: Path) -> None:
    for name in (
        ".git/objects/pack",
        ".venv/lib/x.py",
        "runs/a/step.safetensors",
        "old.tar",
        "dist_lm/x.py",
        "my.yaml",
    ):
        write(tmp_path / name, 10)
    (tmp_path / ".rayignore").write_text("runs\n")
    (tmp_path / ".gitignore").write_text("*.tar\n")
    sent = entry_sizes(tmp_path)
    assert {name for name in sent if not name.startswith(".")} == {"dist_lm", "my.yaml"}
    assert not {".git", ".venv"} & set(sent)
    assert check_package(tmp_path) == sum(sent.values())


def test_the_ignore_file_of_the_repository_keeps_its_package_small() -> None:
    assert check_package(Path(__file__).resolve().parent.parent.parent) < LIMIT_BYTES


def test_a_package_that_is_too_large_is_refused_with_its_largest_entries(tmp_path: Path) -> None:
    write(tmp_path / "corpus" / "a.bin", 70 * MIB)
    write(tmp_path / "notes.bin", 40 * MIB)
    write(tmp_path / "small.txt", 10)
    with pytest.raises(EnvironmentFault) as refused:
        check_package(tmp_path)
    told = str(refused.value)
    assert "the cluster takes 100.0 MiB" in told
    assert told.index("70.0 MiB  corpus") < told.index("40.0 MiB  notes.bin")
    assert ".rayignore" in told
    (tmp_path / ".rayignore").write_text("corpus\n")
    assert check_package(tmp_path) < 41 * MIB


def test_ray_packs_what_was_counted(tmp_path: Path) -> None:
    write(tmp_path / "tree" / "a" / "b.bin", 3 * MIB)
    write(tmp_path / "tree" / ".git" / "c.bin", 5 * MIB)
    counted = check_package(tmp_path / "tree")
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "tree"), package, include_gitignore=True, excludes=list(EXCLUDES))
    assert counted == 3 * MIB
    # Names and a directory of files come on top.
    assert 0 < package.stat().st_size - counted < 1000


def test_the_configuration_must_be_sent_too(tmp_path: Path) -> None:
    config = tmp_path / "tree" / "launch" / "x y.yaml"
    words = "python -m dist_lm train --ray -c 'launch/x y.yaml' optim.lr=1e-4"
    assert entrypoint(config, ["optim.lr=1e-4"], tmp_path / "tree") == words
    # What came with dist_lm is there already.
    assert entrypoint(Path("recipe:ner"), [], tmp_path / "tree") == "python -m dist_lm train --ray -c recipe:ner"
    with pytest.raises(ConfigError, match="does not lie in"):
        entrypoint(tmp_path / "other.yaml", [], tmp_path / "tree")


@pytest.mark.parametrize(
    ("status", "driver", "code"),
    [("SUCCEEDED", 0, 0), ("STOPPED", None, 75), ("FAILED", 3, 3), ("FAILED", None, 1), ("SUCCEEDED", None, 0)],
)
def test_the_exit_code_is_that_of_the_driver(status: str, driver: int | None, code: int) -> None:
    assert Job("x-1", "x", "/runs/x", status, "", "", driver, 0).exit_code == code


def test_submit_refuses_before_anything_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text(RECIPE)

    def error_of(*words: str) -> BaseException | None:
        return CliRunner().invoke(app, ["submit", "-c", "my.yaml", *words]).exception

    relative = error_of("run.dir=runs/x")
    assert isinstance(relative, ConfigError)
    assert "run.dir `runs/x` is relative" in str(relative)
    nobody = f"http://127.0.0.1:{free_port()}"
    away = error_of("run.dir=/shared/x", "--address", nobody)
    assert isinstance(away, EnvironmentFault)
    assert "nobody answers" in str(away)
    no_url = error_of("run.dir=/shared/x", "--address", "head:6379")
    assert isinstance(no_url, ConfigError)
    assert "http://HEAD:8265" in str(no_url)


def test_the_verbs_explain_themselves() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dist_lm", "job", "--help"], capture_output=True, text=True, check=True
    )
    for verb in ("status", "logs", "stop", "resume"):
        assert verb in done.stdout


def test_a_run_folder_that_goes_with_the_job_and_what_is_no_address_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(RECIPE)
    loaded = load_config(path, ["run.dir=runs/x"])
    with pytest.raises(ConfigError, match=r"run\.dir `runs/x` is relative"):
        require_shared_run_dir(loaded, path)
    with pytest.raises(ConfigError, match="`head:8265` is not the address of a dashboard"):
        Jobs("head:8265")
