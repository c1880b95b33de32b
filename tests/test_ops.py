"""Locks of DeepSpeed's op builds: those of the dead are removed, those of the living stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm import ops
from dist_lm.errors import EnvironmentFault


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """torch's extensions folder, with the op's folder in it."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (tmp_path / ops.CPU_OP).mkdir()
    return tmp_path


def test_the_folder_is_the_users_choice_or_one_for_each_python_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert ops.extensions_folder() == tmp_path
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ours = ops.extensions_folder()
    assert ours.parent == tmp_path / "torch_extensions"
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "another-environment"))
    theirs = ops.extensions_folder()
    assert theirs.parent == ours.parent
    assert theirs != ours


def test_the_lock_of_a_build_that_died_is_removed(folder: Path) -> None:
    lock = folder / ops.CPU_OP / "lock"
    lock.touch()
    assert ops.remove_stale_locks() == [lock]
    assert not lock.exists()
    assert ops.remove_stale_locks() == []


def test_the_lock_of_a_live_build_is_kept_until_it_dies(folder: Path) -> None:
    lock = folder / ops.CPU_OP / "lock"
    program = "import sys; lock = open(sys.argv[1], 'x'); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", program, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as builder:
        try:
            assert builder.stdout is not None
            assert builder.stdout.readline() == "held\n"
            assert ops.remove_stale_locks() == []
            assert lock.exists()
        finally:
            builder.kill()
            builder.wait()
    assert lock.exists(), "a killed builder leaves its lock behind"
    assert ops.remove_stale_locks() == [lock]


def test_only_the_locks_of_dead_builds_go_and_the_files_beside_them_stay(folder: Path) -> None:
    other = folder / "cpu_adam"
    other.mkdir()
    (other / "lock").touch()
    (other / "cpu_adam.so").write_bytes(b"\x7fELF")
    with (folder / ops.CPU_OP / "lock").open("w") as held:
        assert ops.remove_stale_locks() == [other / "lock"]
        assert Path(held.name).exists()
    assert (other / "cpu_adam.so").exists()


def test_an_op_counts_as_built_when_its_library_is_there_and_nobody_builds(folder: Path) -> None:
    assert not ops.is_built()
    library = folder / ops.CPU_OP / f"{ops.CPU_OP}.so"
    library.write_bytes(b"\x7fELF")
    assert ops.is_built()
    (folder / ops.CPU_OP / "lock").touch()
    assert not ops.is_built()


def test_an_op_that_is_there_is_built_again_only_where_a_build_died(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = folder / ops.CPU_OP / f"{ops.CPU_OP}.so"
    library.write_bytes(b"\x7fELF")
    # A build would fail.
    monkeypatch.setattr(sys, "executable", "/bin/false")
    ops.build_cpu_op()
    assert library.read_bytes() == b"\x7fELF"
    (folder / ops.CPU_OP / "lock").touch()
    with pytest.raises(EnvironmentFault, match="cannot be built"):
        ops.build_cpu_op()
    assert not (folder / ops.CPU_OP / "lock").exists()


def test_every_process_finds_the_ninja_of_this_environment_first(monkeypatch: pytest.MonkeyPatch) -> None:
    own = str(Path(sys.executable).parent)
    for path in ("/usr/bin:/bin", f"/usr/bin:{own}:/bin", f"{own}:/usr/bin:/bin"):
        monkeypatch.setenv("PATH", path)
        assert ops.own_tools_path() == f"{own}:/usr/bin:/bin"
