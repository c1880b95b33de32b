"""This machine: packages, accelerators, shared memory, limits, its name, ports, proxies.

Enters: nothing but the machine.  Leaves: findings.  Promises: nothing is changed.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from dist_lm.doctor.finding import Finding, fail, ok, warn

_SHOWN = ("torch", "deepspeed", "transformers", "ray", "webdataset", "tokenizers")
SHARED_MEMORY_BYTES = 1 << 30
"""DeepSpeed's CPU collectives and Ray's object store lie there; containers get 64 MiB unless told."""
OPEN_FILES = 4096
_LAUNCHER_PORT = 29500
"""What `deepspeed` and `torchrun` take where MASTER_PORT says nothing."""
_MEETING = "meeting port"
_LOOPBACK_S = 5.0
_RAISE_LOOPBACK = "ip link set lo up (as root): the processes of a run meet there, on one machine too."


def check_versions() -> Iterator[Finding]:
    """Every required package is there, in a version that the project takes."""
    from packaging.requirements import Requirement

    wrong = False
    for text in requires("dist-lm") or ():
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        do = f"pip install '{wanted.name}{wanted.specifier}' -c constraints.txt"
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            wrong = True
            yield fail("versions", f"{wanted.name} is not installed", do)
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            wrong = True
            yield fail("versions", f"{wanted.name} {found} is not {wanted.specifier}", do)
    if not wrong:
        shown = ", ".join(f"{name} {version(name)}" for name in _SHOWN)
        yield ok("versions", f"Python {platform.python_version()}, {shown}")


def check_accelerators(precision: str | None = None) -> Iterator[Finding]:
    """GPUs that torch sees; `precision` is that of the run, if there is one."""
    import torch

    count = torch.cuda.device_count()
    if not count:
        built = torch.version.cuda or torch.version.hip
        if built and shutil.which("nvidia-smi"):
            do = "Look at nvidia-smi; the driver must be new enough for this torch."
            yield fail("accelerators", f"torch for CUDA {built} sees no GPU", do)
        elif shutil.which("nvidia-smi"):
            do = "Install a torch that is built for CUDA."
            yield fail("accelerators", f"torch {torch.__version__} is built for the CPU, this machine has a GPU", do)
        else:
            yield ok("accelerators", f"no GPU; {os.cpu_count()} CPUs: train with --cpu N")
        return
    names = sorted({torch.cuda.get_device_name(index) for index in range(count)})
    yield ok("accelerators", f"{count} x {', '.join(names)}, CUDA {torch.version.cuda}")
    if precision == "bf16" and not torch.cuda.is_bf16_supported():
        yield fail("accelerators", f"{names[0]} has no bf16, precision is bf16", "Write precision=fp16 or fp32.")


def check_shared_memory(folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    if not folder.is_dir():
        yield fail("shared memory", f"{folder} is missing", "Mount it: mount -t tmpfs none /dev/shm")
        return
    usage = shutil.disk_usage(folder)
    if usage.free < SHARED_MEMORY_BYTES:
        yield warn(
            "shared memory",
            f"{folder} has {usage.free / 2**20:.0f} of {usage.total / 2**20:.0f} MiB free; ranks may die of SIGBUS",
            "docker run --shm-size 16g; on Kubernetes an emptyDir with medium: Memory at /dev/shm.",
        )
    else:
        yield ok("shared memory", f"{folder} has {usage.free / 2**30:.1f} GiB free")


def check_limits() -> Iterator[Finding]:
    """What this shell lets a process do."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files != resource.RLIM_INFINITY and files < OPEN_FILES:
        hard = "" if most == resource.RLIM_INFINITY or most >= OPEN_FILES else " (as root: the hard limit is lower)"
        yield warn("limits", f"a process may open {files} files", f"ulimit -n 65536{hard}")
    else:
        yield ok("limits", f"a process may open {files} files")
    size, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    if size != resource.RLIM_INFINITY:
        yield fail("limits", f"a file may not be larger than {size / 2**20:.1f} MiB", "ulimit -f unlimited")


def check_network(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """The machine's own name and address, the port where ranks meet, proxies."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
        yield ok("network", f"the host name {name} has an address")
    except OSError as error:
        do = f"Add `127.0.0.1 {name}` to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo on a single machine."
        yield fail("network", f"the host name {name} has no address: {error}", do)
    trouble = loopback_error()
    if trouble:
        yield fail("network", f"127.0.0.1 cannot be reached: {trouble}", _RAISE_LOOPBACK)
    proxies = [key for key in environment if key.lower() in ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")]
    exempt = environment.get("no_proxy", environment.get("NO_PROXY", ""))
    if proxies and not {"localhost", "127.0.0.1", "*"} & {word.strip() for word in exempt.split(",")}:
        do = f"export no_proxy=localhost,127.0.0.1,{name} with the addresses of all nodes."
        yield warn("network", f"{', '.join(proxies)} is set without exceptions; Ray would ask the proxy for nodes", do)
    yield _meeting_port(environment)


def loopback_error() -> str:
    """What is wrong with the address where the ranks of one machine meet; empty where nothing is."""
    try:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            server.listen()
            socket.create_connection(server.getsockname(), timeout=_LOOPBACK_S).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _meeting_port(environment: Mapping[str, str]) -> Finding:
    told = environment.get("MASTER_PORT", "")
    if told and not (told.isdecimal() and 0 < int(told) < 65536):
        return fail(_MEETING, f"MASTER_PORT is `{told}`", "Set a number below 65536, or unset it.")
    port = int(told or _LAUNCHER_PORT)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            do = f"deepspeed --master_port {port + 1} ..., or end what listens there; `dist-lm train` takes a free one."
            return (fail if told else warn)(_MEETING, f"port {port} cannot be had: {error.strerror}", do)
    return ok(_MEETING, f"port {port} is free")
