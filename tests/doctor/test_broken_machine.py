"""The doctor on a machine that is broken for real: each check names the fault and its remedy."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm import ops
from dist_lm.deepspeed_keys import needed_ops
from dist_lm.doctor import compiled_ops, machine, ray_side, storage
from dist_lm.doctor.collectives import check_collectives
from dist_lm.doctor.doctor import mend
from dist_lm.doctor.finding import Finding
from dist_lm.errors import EnvironmentFault
from tests.gloo_ranks import REPOSITORY


def worst(findings: object) -> list[Finding]:
    return [finding for finding in findings if finding.level != "ok"]  # type: ignore[attr-defined]


def findings_after(shell: str, check: str) -> str:
    """What a check prints in a process that a shell line prepared."""
    imports = "from pathlib import Path\nfrom dist_lm.doctor import machine, storage\n"
    done = subprocess.run(
        ["sh", "-c", f'{shell} "$0" -c "$1"', sys.executable, f"{imports}for f in {check}: print(f.line())"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def mounted(folder: Path, size: str) -> str:
    """Begins a shell line that goes on in a mount namespace where the folder is a small file system."""
    inner = f'mount -t tmpfs -o size={size} none {folder} && exec "$@"'
    return f"exec unshare --user --map-root-user --mount sh -c '{inner}' sh"


APART = ("unshare", "--user", "--map-root-user", "--mount", "--net", "--uts", "sh", "-c")
BROKEN = """
import socket, sys
taken = socket.socket()
taken.bind(("", int(sys.argv[1])))
taken.listen()
from dist_lm.cli import main
main(["doctor"])
"""


def doctor_apart(prepare: str, code: str, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python in namespaces without any network, after a shell line that changes them."""
    possible = subprocess.run([*APART, "true"], capture_output=True, text=True, check=False)
    if possible.returncode:
        pytest.skip(f"no namespaces here: {possible.stderr.strip()}")
    variables.setdefault("PYTHONPATH", str(REPOSITORY))
    return subprocess.run(
        [*APART, f'{prepare} && exec "$@"', "sh", sys.executable, "-c", code, *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    folder = tmp_path / "ops" / ops.CPU_OP
    folder.mkdir(parents=True)
    return folder


def distribution(folder: Path, name: str, version: str) -> None:
    """A package that `importlib.metadata` finds in this folder."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_versions_of_this_environment_are_right() -> None:
    (finding,) = machine.check_versions()
    assert finding.level == "ok"


def test_a_wrong_torch_is_named_with_the_version_that_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    distribution(tmp_path, "torch", "1.13.1")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = machine.check_versions()
    assert finding.level == "fail"
    assert finding.what.startswith("torch 1.13.1 is not ")
    assert finding.do.startswith("pip install 'torch")


def test_one_look_names_everything_that_is_wrong_and_its_remedy(tmp_path: Path, extensions: Path) -> None:
    distribution(tmp_path, "torch", "1.13.1")
    (extensions / "lock").touch()
    prepare = "mount -t tmpfs -o size=64m none /dev/shm && hostname no-such-name"
    variables = {"MASTER_PORT": "29517", "CXX": "no-such-compiler", "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = doctor_apart(prepare, BROKEN, "29517", **variables)
    assert done.returncode == EnvironmentFault.exit_code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for what, do in {
        "fail  versions: torch 1.13.1 is not": "pip install 'torch",
        "warn  shared memory: /dev/shm has 64 of 64 MiB free": "--shm-size",
        "fail  network: the host name no-such-name has no address": "/etc/hosts",
        "fail  network: 127.0.0.1 cannot be reached": "ip link set lo up",
        "fail  meeting port: port 29517 cannot be had": "--master_port",
        "fail  op locks: a build that died left": "dist-lm doctor --fix",
        "fail  compiler: there is no no-such-compiler": "apt-get install g++",
    }.items():
        assert what in done.stdout
        assert do in done.stdout.partition(what)[2].partition("-> ")[2].partition("\n")[0]
    # Ranks cannot meet, and would wait for a minute.
    assert "collectives" not in done.stdout


def test_a_torch_that_cannot_be_imported_is_told(tmp_path: Path) -> None:
    distribution(tmp_path, "torch", "2.10.0")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text('raise ImportError("libcudart.so.11.0: cannot open shared object")')
    done = subprocess.run(
        [sys.executable, "-m", "dist_lm", "doctor"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == EnvironmentFault.exit_code, done.stderr
    told = "fail  libraries: torch cannot be imported: ImportError: libcudart.so.11.0: cannot open shared object\n"
    assert f"{told}      -> pip install" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_data_on_a_server_that_is_not_reached_are_told_at_once() -> None:
    check = (
        "from dist_lm.doctor.storage import check_source\nfor f in check_source('http://192.0.2.1/d'): print(f.line())"
    )
    done = doctor_apart("true", check)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("fail  storage: cannot read from storage (http://192.0.2.1/d/manifest.json)")
    assert "2 attempts failed" in done.stdout
    assert "the network" in done.stdout


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "dist_lm-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: dist-lm\nVersion: 0\n"
        "Requires-Dist: not-there-at-all>=2\nRequires-Dist: optional-one; extra == 'dev'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = machine.check_versions()
    assert (finding.level, finding.what) == ("fail", "not-there-at-all is not installed")
    assert finding.do == "pip install 'not-there-at-all>=2' -c constraints.txt"


def test_a_small_shared_memory_is_told_with_the_options_of_docker_and_kubernetes(tmp_path: Path) -> None:
    words = findings_after(mounted(tmp_path, "64m"), f"machine.check_shared_memory(Path('{tmp_path}'))")
    assert words.startswith("warn  shared memory")
    assert "64 of 64 MiB free" in words
    assert "--shm-size" in words
    assert "medium: Memory" in words


def test_no_shared_memory_at_all_fails(tmp_path: Path) -> None:
    (finding,) = machine.check_shared_memory(tmp_path / "shm")
    assert finding.level == "fail"
    assert "mount" in finding.do


def test_low_limits_are_told() -> None:
    words = findings_after("ulimit -n 256 && ulimit -f 1000 && exec", "machine.check_limits()")
    assert "warn  limits: a process may open 256 files\n      -> ulimit -n 65536" in words
    assert "fail  limits: a file may not be larger than 0.5 MiB\n      -> ulimit -f unlimited" in words


def test_a_busy_meeting_port_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        finding = list(machine.check_network({"MASTER_PORT": str(port)}))[-1]
    assert finding.level == "fail"
    assert f"port {port} cannot be had" in finding.what
    assert "--master_port" in finding.do
    assert list(machine.check_network({"MASTER_PORT": str(port)}))[-1].level == "ok"


def test_a_port_that_is_no_number_and_a_proxy_without_exceptions_are_told() -> None:
    found = worst(machine.check_network({"MASTER_PORT": "http", "http_proxy": "http://proxy:3128"}))
    assert [finding.level for finding in found] == ["warn", "fail"]
    assert found[0].do.startswith("export no_proxy=localhost")
    proxied = {"http_proxy": "http://proxy:3128", "no_proxy": "localhost,127.0.0.1"}
    assert not [finding for finding in worst(machine.check_network(proxied)) if "proxy" in finding.what]


def test_without_a_compiler_an_op_that_is_not_built_fails(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    (finding,) = compiled_ops.check_ops({}, cpu=True)
    assert finding.level == "fail"
    assert f"there is no no-such-compiler in PATH; {ops.CPU_OP} cannot be built" in finding.what
    assert "apt-get install g++" in finding.do


def test_a_stale_lock_fails_and_is_mended(extensions: Path) -> None:
    lock = extensions / "lock"
    lock.touch()
    found = list(compiled_ops.check_ops({}, cpu=True))
    assert [finding.check for finding in found] == ["op locks", "ops"]
    assert str(lock) in found[0].what
    assert found[0].level == "fail"
    assert lock.exists(), "looking changes nothing"
    assert mend(found[0]).level == "ok"
    assert not lock.exists()
    assert "op locks" not in [finding.check for finding in compiled_ops.check_ops({}, cpu=True)]


def test_a_remedy_that_fails_is_told(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = compiled_ops.check_ops({}, cpu=True)
    assert (finding.level, finding.check) == ("warn", "ops")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    mended = mend(finding)
    assert mended.level == "fail"
    assert "cannot be built" in mended.what


def test_an_op_whose_library_is_damaged_does_not_load(extensions: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (extensions / f"{ops.CPU_OP}.so").write_bytes(b"\x7fELF")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    (finding,) = compiled_ops.check_ops({}, cpu=True)
    assert finding.level == "fail"
    assert "dist-lm ops build" in finding.do


def test_the_ops_of_a_configuration_follow_from_where_it_offloads_to() -> None:
    to_cpu = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    to_disk = {"zero_optimization": {"offload_optimizer": {"device": "nvme"}, "offload_param": {"device": "nvme"}}}
    assert needed_ops({}, cpu=False) == []
    in_part = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}
    assert needed_ops(to_cpu, cpu=True) == [ops.CPU_OP]
    assert needed_ops({**to_cpu, "zero_force_ds_cpu_optimizer": True}, cpu=False) == [ops.CPU_ADAM]
    assert needed_ops(in_part, cpu=False) == [ops.CPU_ADAM]
    assert needed_ops(to_disk, cpu=False) == [ops.CPU_ADAM, ops.ASYNC_IO]


def test_a_folder_that_may_not_be_written_fails_and_a_good_one_stays_as_it_was(tmp_path: Path) -> None:
    assert next(storage.check_folder(tmp_path / "new" / "run", "run folder")).level == "ok"
    assert list(tmp_path.iterdir()) == []
    (finding,) = storage.check_folder("/proc/run", "run folder")
    assert finding.level == "fail"
    assert finding.exit_code == 4
    (tmp_path / "file").touch()
    (finding,) = storage.check_folder(tmp_path / "file" / "run", "run folder")
    assert f"{tmp_path / 'file'} is a file" in finding.what


def test_a_full_disk_fails_with_the_free_space(tmp_path: Path) -> None:
    words = findings_after(mounted(tmp_path, "32k"), f"storage.check_folder('{tmp_path}', 'disk')")
    assert words.startswith(f"fail  disk: cannot write {tmp_path}")
    assert "No space left" in words
    assert "Free space" in words


def test_a_web_server_is_no_place_for_a_run() -> None:
    (finding,) = storage.check_folder("http://user:secret@127.0.0.1:9/runs", "checkpoints")
    assert finding.level == "fail"
    assert "secret" not in finding.line()


def test_ranks_that_cannot_meet_are_told_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = check_collectives(2, cpu=True)
    assert finding.level == "ok"
    assert float(finding.what.split()[-2]) > 0
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no-such-interface")
    (finding,) = check_collectives(2, cpu=True)
    assert finding.level == "fail"
    assert "GLOO_SOCKET_IFNAME" in finding.do


def test_a_token_that_others_may_read_fails_and_is_mended(tmp_path: Path) -> None:
    (finding,) = ray_side.check_token({}, tmp_path)
    assert finding.level == "warn"
    assert "get-auth-token" in finding.do
    (finding,) = ray_side.check_token({"RAY_AUTH_MODE": "token"}, tmp_path)
    assert finding.level == "fail"
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("secret")
    token.chmod(0o644)
    (finding,) = ray_side.check_token({"RAY_AUTH_MODE": "token"}, tmp_path)
    assert "mode 0644" in finding.what
    mend(finding)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert worst(ray_side.check_token({"RAY_AUTH_MODE": "token"}, tmp_path)) == []


def test_a_working_directory_that_is_too_large_is_told_with_its_largest_entry(tmp_path: Path) -> None:
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(101 * 2**20)
    (finding,) = ray_side.check_job_package(tmp_path)
    assert finding.level == "fail"
    assert "weights.bin" in finding.line()
    assert ".rayignore" in finding.do
    (tmp_path / ".rayignore").write_text("*.bin\n")
    assert worst(ray_side.check_job_package(tmp_path)) == []


def test_a_cluster_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    (finding,) = ray_side.check_cluster(None)
    assert finding.what.startswith("nobody answers at 127.0.0.1:9")
    assert finding.exit_code == 4
    # Without an address the cluster of this machine is meant, whose network may be gone.
    monkeypatch.delenv("RAY_ADDRESS")
    monkeypatch.setattr("ray._private.services.canonicalize_bootstrap_address", lambda address: "127.0.0.1:9")
    (finding,) = ray_side.check_cluster(None)
    assert finding.what.startswith("nobody answers at 127.0.0.1:9")
