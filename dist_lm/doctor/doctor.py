"""Is this machine, cluster and configuration able to run?

Enters: what to look at.  Leaves: findings, as they are made.  Promises: a check that fails does not
hide the others; nothing is changed but by `mend`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dist_lm.config import RunConfig
from dist_lm.doctor import compiled_ops, machine, storage
from dist_lm.doctor.finding import Finding, fail, of_error, ok
from dist_lm.errors import DistLMError

_LIBRARIES = ("torch", "deepspeed", "transformers")
"""What training imports; the checks of a machine alone need the first."""


@dataclass(frozen=True)
class Wanted:
    """What the doctor looks at."""

    config: Path | None = None
    overrides: Sequence[str] = ()
    cluster: bool = False
    data: bool = False


def examine(wanted: Wanted) -> Iterator[Finding]:
    """Findings, the quick ones first."""
    settings, findings = _configuration(wanted)
    yield from machine.check_versions()
    yield from machine.check_shared_memory()
    yield from machine.check_limits()
    yield from machine.check_network()
    yield from findings
    data = settings
    if settings is not None:
        for finding in _run_folders(settings):
            if (finding.check, finding.level) == ("storage", "fail"):
                # Whoever opens the data would wait for minutes, and say the same.
                data = None
            yield finding
    else:
        yield from storage.check_folder(Path.cwd(), "disk")
    if wanted.cluster:
        yield from _ray(settings)
    broken = _broken_library(_LIBRARIES if settings else _LIBRARIES[:1])
    if broken is not None:
        yield broken
        return
    yield from _training(settings)
    yield from _data(data, every_byte=wanted.data)


def mend(finding: Finding) -> Finding:
    """The finding after its remedy; itself where there is none that is safe."""
    if finding.fix is None:
        return finding
    try:
        finding.fix()
    except DistLMError as error:
        return of_error(finding.check, error)
    return ok(finding.check, f"mended: {finding.what}")


def _configuration(wanted: Wanted) -> tuple[RunConfig | None, list[Finding]]:
    from dist_lm.deepspeed_config import load_run

    if wanted.config is None:
        return None, []
    try:
        config = load_run(wanted.config, wanted.overrides).config
    except DistLMError as error:
        return None, [of_error("configuration", error)]
    return config, [ok("configuration", f"{wanted.config} holds together: {config.task.name}, {config.precision}")]


def _run_folders(config: RunConfig) -> Iterator[Finding]:
    yield from storage.check_folder(config.run.dir, "run folder")
    if config.run.checkpoints:
        yield from storage.check_folder(config.run.checkpoints, "checkpoints")
    if config.data.cache.dir is not None:
        yield from storage.check_folder(config.data.cache.dir, "shard cache")
    for location in config.data.locations:
        yield from storage.check_source(location)


def _broken_library(libraries: Sequence[str]) -> Finding | None:
    """The first one that cannot be imported."""
    for library in libraries:
        try:
            importlib.import_module(library)
        # What is wrong with a library can come as any error.
        except Exception as error:
            what = f"{library} cannot be imported: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            return fail("libraries", what, f"pip install --force-reinstall {' '.join(_LIBRARIES)} -c constraints.txt")
    return None


def _training(config: RunConfig | None) -> Iterator[Finding]:
    """The checks that import torch."""
    import torch

    from dist_lm.doctor.collectives import check_collectives
    from dist_lm.json_tree import read_json_tree
    from dist_lm.yaml_tree import plain

    gpus = torch.cuda.device_count()
    yield from machine.check_accelerators(config.precision if config else None)
    file = config.deepspeed if config else None
    yield from compiled_ops.check_ops(plain(read_json_tree(file)) if file else {}, cpu=not gpus)
    if not machine.loopback_error():
        yield from check_collectives(max(gpus, 2) if gpus != 1 else 1, cpu=not gpus)


def _data(config: RunConfig | None, *, every_byte: bool) -> Iterator[Finding]:
    from dist_lm.doctor.run_settings import check_data, check_data_bytes

    if config is not None:
        yield from check_data(config)
        if every_byte:
            yield from check_data_bytes(config)


def _ray(config: RunConfig | None) -> Iterator[Finding]:
    from dist_lm.doctor.ray_side import check_cluster, check_job_package, check_token

    yield from check_token()
    yield from check_job_package(Path.cwd())
    yield from check_cluster(config.run.dir if config else None)
