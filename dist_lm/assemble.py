"""Everything that a run needs before its first step, checked in the order of its cost.

Enters: a configuration and connected ranks.  Leaves: Parts.
Promises: what is wrong with the input is said by all ranks alike, before weights are made; a run
folder is claimed only after that.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from dataclasses import dataclass
from typing import Any

import torch
import yaml

import dist_lm
from dist_lm import disk
from dist_lm.config import RunConfig
from dist_lm.config_files import LoadedConfig, identity, identity_diff
from dist_lm.data.manifest import Manifest
from dist_lm.data.stream import Stream
from dist_lm.data.tokenizer import Tokenizer, compare_tokenizer, load_tokenizer
from dist_lm.data.views import View, view_of
from dist_lm.deepspeed_config import check_with_deepspeed, resolve
from dist_lm.engine import Engine
from dist_lm.errors import DataError, DistLMError
from dist_lm.ranks import Ranks
from dist_lm.run_dir import RunDir, check_space
from dist_lm.schedule import BatchPlan
from dist_lm.tasks.base import Task
from dist_lm.tasks.registry import build_task

log = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_FP32_BYTES = 4
# A checkpoint holds the weights and Adam's two moments; two of them exist while one replaces the other.
_CHECKPOINT_COPIES = 3


@dataclass(frozen=True)
class Parts:
    """A run that is ready for its first step."""

    config: RunConfig
    ranks: Ranks
    run_dir: RunDir
    attempt: int
    plan: BatchPlan
    task: Task
    engine: Engine
    shapes: dict[str, tuple[int, ...]]
    """Trainable parameters by their Hugging Face names."""
    data_fingerprint: str
    num_rows: int


@dataclass(frozen=True)
class _Inputs:
    plan: BatchPlan
    tokenizer: Tokenizer
    view: View
    task: Task
    identity: dict[str, Any]
    data_fingerprint: str


def assemble(loaded: LoadedConfig, ranks: Ranks, *, launcher: str) -> Parts:
    """Raises ConfigError, DataError or EnvironmentFault, the same on every rank."""
    config = loaded.config
    inputs = _together(ranks, lambda: _read_inputs(config, ranks))
    run_dir = RunDir(config.run.dir)
    ranks.agree(
        lambda: run_dir.claim(
            inputs.identity,
            lambda stored: identity_diff(stored, inputs.identity, config.run.allow_change),
        )
    )
    model = inputs.task.build_model(config.model)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    num_parameters = sum(p.numel() for p in model.parameters())
    ranks.agree(lambda: check_space(run_dir.path, num_parameters * _FP32_BYTES * _CHECKPOINT_COPIES))
    resolved = resolve(
        config,
        world_size=ranks.world_size,
        micro_rows=inputs.plan.rows_per_micro,
        micro_steps=inputs.plan.micro_steps,
        hidden_size=getattr(model.config, "hidden_size", None),
        source_of=loaded.origins,
    )
    _together(ranks, lambda: check_with_deepspeed(resolved.settings, ranks.world_size, file=config.deepspeed))
    ranks.agree(lambda: _describe(run_dir, config, resolved.settings, model, inputs.tokenizer))
    engine = Engine(
        model,
        inputs.task,
        optim=config.optim,
        deepspeed_settings=resolved.settings,
        ranks=ranks,
        seed=config.run.seed,
    )
    pids = ranks.gather(os.getpid())
    hosts = ranks.gather(platform.node())
    facts = {"launcher": launcher, "world_size": ranks.world_size, "pids": pids, "hosts": hosts}
    attempt = ranks.agree(lambda: run_dir.open_attempt(facts))
    if ranks.is_first:
        _header(config, inputs, engine, num_parameters, attempt, launcher)
    return Parts(
        config,
        ranks,
        run_dir,
        attempt,
        inputs.plan,
        inputs.task,
        engine,
        shapes,
        inputs.data_fingerprint,
        inputs.view.num_rows,
    )


def _together(ranks: Ranks, work: Any) -> Any:
    """Result of `work` on this rank, once it succeeded on all of them."""
    result, failure = None, None
    try:
        result = work()
    except DistLMError as error:
        failure = error
    ranks.raise_together(failure)
    return result


def _read_inputs(config: RunConfig, ranks: Ranks) -> _Inputs:
    plan = BatchPlan.divide(config.batch.global_rows, config.batch.micro_rows, ranks.world_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    manifest = Manifest.load(config.data.train)
    compare_tokenizer(manifest, tokenizer, folder=config.data.train)
    view = view_of(manifest, config.data.seq_len, where=str(config.data.train))
    fingerprints = {"data.train": manifest.fingerprint}
    if config.data.heldout is not None:
        heldout = Manifest.load(config.data.heldout)
        compare_tokenizer(heldout, tokenizer, folder=config.data.heldout)
        view_of(heldout, view.seq_len, where=str(config.data.heldout))
        if heldout.labels != manifest.labels:
            raise DataError(
                "training and held-out data have different labels",
                where=f"{config.data.train} and {config.data.heldout}",
                do="Prepare both from the same source in one call.",
            )
    task = build_task(config.task, tokenizer, view, config.run.seed)
    # Opening the stream reads no data; it refuses a data set that cannot fill one batch.
    stream = open_stream(config, ranks, task, position=0)
    facts = {**identity(config), **fingerprints}
    return _Inputs(plan, tokenizer, view, task, facts, stream.fingerprint)


def open_stream(config: RunConfig, ranks: Ranks, task: Task, *, position: int) -> Stream:
    """This rank's training rows from `position` on."""
    return Stream(
        config.data.train,
        seed=config.run.seed,
        lanes=config.data.lanes,
        era=config.data.era,
        global_rows=config.batch.global_rows,
        rank=ranks.rank,
        world_size=ranks.world_size,
        position=position,
        seq_len=config.data.seq_len,
        partner_columns=task.partner_columns,
    )


def _describe(run_dir: RunDir, config: RunConfig, settings: dict[str, Any], model: Any, tokenizer: Tokenizer) -> None:
    """Leave what an export, a reader or a later attempt needs to know."""
    content = yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False)
    disk.write_bytes(run_dir.config, content.encode())
    disk.write_json(run_dir.path / "ds_config.json", settings)
    versions = {
        "dist_lm": dist_lm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    disk.write_json(run_dir.path / "env.json", versions)
    with disk.disk_errors(run_dir.model):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(run_dir.model)
        for name in TOKENIZER_FILES:
            if (tokenizer.path / name).is_file():
                shutil.copyfile(tokenizer.path / name, run_dir.model / name)


def _header(
    config: RunConfig, inputs: _Inputs, engine: Engine, num_parameters: int, attempt: int, launcher: str
) -> None:
    plan, ranks = inputs.plan, engine.ranks
    log.info(
        "dist_lm %s  %s  %.1fM parameters  %d x %s  ZeRO-%d %s  by %s  attempt %d",
        dist_lm.__version__,
        config.task.name,
        num_parameters / 1e6,
        ranks.world_size,
        ranks.device.type,
        engine.stage,
        config.precision,
        launcher,
        attempt,
    )
    log.info("run     %s", config.run.dir)
    log.info(
        "data    %d rows of up to %d tokens in %d shards, %.1f epochs",
        inputs.view.num_rows,
        inputs.view.seq_len,
        len(inputs.view.manifest.shards),
        config.run.steps * plan.global_rows / inputs.view.num_rows,
    )
    log.info(
        "batch   global %d = %d ranks x %d micro-steps x %d rows%s",
        plan.global_rows,
        plan.world_size,
        plan.micro_steps,
        plan.rows_per_micro,
        "" if plan.world_size * plan.micro_steps * plan.rows_per_micro == plan.global_rows else " (some empty)",
    )
