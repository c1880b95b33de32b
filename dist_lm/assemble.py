"""Everything that a run needs before its first step, checked in the order of its cost.

Enters: a configuration and connected ranks.  Leaves: Parts.
Promises: what is wrong with the input is said by all ranks alike, before weights are made; a run
folder is claimed only after that.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import platform
import shutil
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

import dist_lm
from dist_lm import disk, ops
from dist_lm.attempt import Attempt
from dist_lm.checkpoint.manifest import Progress
from dist_lm.config import RunConfig
from dist_lm.config_files import LoadedConfig, identity, identity_diff
from dist_lm.data.cache import ShardCache
from dist_lm.data.location import redact
from dist_lm.data.manifest import Manifest
from dist_lm.data.stream import Stream
from dist_lm.data.tokenizer import Tokenizer, compare_tokenizer, load_tokenizer
from dist_lm.data.training_set import TrainingSet
from dist_lm.data.views import view_of
from dist_lm.deepspeed_config import check_with_deepspeed, resolve
from dist_lm.deepspeed_keys import needed_ops
from dist_lm.engine import Engine
from dist_lm.errors import DataError, DistLMError
from dist_lm.header import device_name, header
from dist_lm.memory import chosen_micro_rows
from dist_lm.mesh import Mesh
from dist_lm.parameters import frozen_sha256
from dist_lm.ranks import Ranks
from dist_lm.run_dir import RunDir, check_space
from dist_lm.run_model import FROZEN_KEY
from dist_lm.schedule import BatchPlan
from dist_lm.sequence_parallel import share_rows
from dist_lm.stop import StopFlag
from dist_lm.tasks.base import Task
from dist_lm.tasks.registry import build_task

log = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_FP32_BYTES = 4
# A checkpoint holds the weights and Adam's two moments; two of them exist while one replaces the other.
_CHECKPOINT_COPIES = 3


@dataclass(frozen=True)
class Parts:
    """A run that is ready for its first step."""

    config: RunConfig
    ranks: Ranks
    mesh: Mesh
    run_dir: RunDir
    attempt: Attempt
    plan: BatchPlan
    task: Task
    engine: Engine
    shapes: dict[str, tuple[int, ...]]
    """Trainable parameters by their Hugging Face names."""
    data: TrainingSet
    cache: ShardCache | None
    """Copies of remote shards on this machine."""
    micro_rows: int
    """Most rows of one forward pass on one rank."""


@dataclass(frozen=True)
class _Inputs:
    mesh: Mesh
    plan: BatchPlan
    tokenizer: Tokenizer
    data: TrainingSet
    task: Task
    identity: dict[str, Any]
    micro_rows: int


def assemble(loaded: LoadedConfig, ranks: Ranks, *, stop: StopFlag, launcher: str) -> Parts:
    """Raises ConfigError, DataError or EnvironmentFault, the same on every rank.

    The attempt that it begins is the caller's to end.
    """
    config = loaded.config
    inputs = _together(ranks, lambda: _read_inputs(config, ranks))
    run_dir = RunDir(config.run.dir)
    model = _together(ranks, lambda: inputs.task.build_model(config.model))
    _together(ranks, lambda: share_rows(model, inputs.mesh))
    facts = {**inputs.identity, **ranks.agree(lambda: model_facts(config, model))}
    ranks.agree(lambda: run_dir.claim(facts, lambda stored: identity_diff(stored, facts, config.run.allow_change)))
    attempt = Attempt.begin(run_dir, config.run, ranks, stop, launcher=launcher)
    try:
        return _build(loaded, inputs, model, run_dir, attempt, ranks, launcher)
    except BaseException as error:
        attempt.end(error)
        raise


def _build(
    loaded: LoadedConfig,
    inputs: _Inputs,
    model: PreTrainedModel,
    run_dir: RunDir,
    attempt: Attempt,
    ranks: Ranks,
    launcher: str,
) -> Parts:
    """The engine, once it is certain that this run is wanted."""
    config = loaded.config
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    num_parameters = sum(p.numel() for p in model.parameters())
    ranks.agree(lambda: check_space(run_dir.path, num_parameters * _FP32_BYTES * _CHECKPOINT_COPIES))
    resolved = resolve(
        config,
        world_size=ranks.world_size,
        micro_rows=inputs.plan.rows_per_micro,
        micro_steps=inputs.plan.micro_steps,
        hidden_size=getattr(model.config, "hidden_size", None),
        num_parameters=num_parameters,
        source_of=loaded.origins,
    )
    _together(ranks, lambda: check_with_deepspeed(resolved.settings, ranks.world_size, file=config.deepspeed))
    ranks.agree(lambda: _describe(run_dir, loaded, resolved.settings, model, inputs.tokenizer, ranks.device))
    # Ranks that build an op at the same time wait for each other's lock, and for ever if one is killed.
    for name in needed_ops(resolved.settings, cpu=ranks.device.type == "cpu"):
        _together(ranks, functools.partial(ops.build, name))
    engine = Engine(
        model,
        inputs.task,
        optim=config.optim,
        deepspeed_settings=resolved.settings,
        ranks=ranks,
        seed=config.run.seed,
        compiled=config.model.compile,
    )
    parts = Parts(
        config,
        ranks,
        inputs.mesh,
        run_dir,
        attempt,
        inputs.plan,
        inputs.task,
        engine,
        shapes,
        inputs.data,
        open_cache(config),
        inputs.micro_rows,
    )
    if ranks.is_first:
        log.info("%s", header(parts, num_parameters=num_parameters, launcher=launcher))
    return parts


def _together(ranks: Ranks, work: Any) -> Any:
    """Result of `work` on this rank, once it succeeded on all of them."""
    result, failure = None, None
    try:
        result = work()
    except DistLMError as error:
        failure = error
    ranks.raise_together(failure)
    return result


def model_facts(config: RunConfig, model: Any) -> dict[str, str]:
    """What decides the model and stands in files: its config.json, and the weights that are not trained.

    Checkpoints hold trained weights only: a run goes on only over the same frozen ones.
    """
    facts = {FROZEN_KEY: frozen_sha256(model)}
    if config.model.config is not None:
        fields = {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"}
        facts["model.config"] = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
    return {key: value for key, value in facts.items() if value}


def _read_inputs(config: RunConfig, ranks: Ranks) -> _Inputs:
    micro_rows = ranks.agree(lambda: chosen_micro_rows(config, RunDir(config.run.dir)))
    mesh = Mesh.of(ranks.rank, ranks.world_size, config.sequence_parallel_size)
    plan = BatchPlan.divide(config.batch.global_rows, micro_rows, mesh.data_world_size)
    tokenizer = load_tokenizer(config.data.tokenizer)
    data = open_training_set(config)
    for source in data.sources:
        compare_tokenizer(source.view.manifest, tokenizer, folder=source.location)
    check_heldout(config, data, tokenizer)
    task = build_task(config.task, tokenizer, data.view, config.run.seed)
    data.refuse_larger_batch(config.batch.global_rows)
    facts = {**identity(config), "data.train": data.identity(config.data.sources)}
    return _Inputs(mesh, plan, tokenizer, data, task, facts, micro_rows)


def check_heldout(config: RunConfig, data: TrainingSet, tokenizer: Tokenizer) -> None:
    """DataError where held-out data are of another tokenizer, or have other labels, than the training data."""
    for location in config.data.heldout_sets.values():
        heldout = Manifest.load(location)
        compare_tokenizer(heldout, tokenizer, folder=location)
        view_of(heldout, data.view.seq_len, where=redact(location))
        if heldout.labels != data.view.manifest.labels:
            raise DataError(
                "training and held-out data have different labels",
                where=f"{redact(data.sources[0].location)} and {redact(location)}",
                do="Prepare both from the same source in one call.",
            )


def open_training_set(config: RunConfig) -> TrainingSet:
    """The sources of the configuration; reads manifests only."""
    data = config.data
    return TrainingSet(
        data.sources,
        seed=config.run.seed,
        lanes=data.lanes,
        era=data.era,
        seq_len=data.seq_len,
        stages=[((stage.from_step - 1) * config.batch.global_rows, stage.weights) for stage in data.stages],
    )


def open_cache(config: RunConfig) -> ShardCache | None:
    """The cache of the configuration; None without one."""
    cache = config.data.cache
    return ShardCache(cache.dir, int(cache.limit_gb * 1e9)) if cache.dir is not None else None


def open_stream(parts: Parts, progress: Progress) -> Stream:
    """This rank's training rows from where the run stands on."""
    return Stream(
        parts.data,
        global_rows=parts.config.batch.global_rows,
        rank=parts.mesh.data_rank,
        world_size=parts.mesh.data_world_size,
        position=progress.position,
        partner_columns=parts.task.partner_columns,
        cache=parts.cache,
        quarantine=progress.quarantine,
    )


def _describe(
    run_dir: RunDir,
    loaded: LoadedConfig,
    settings: dict[str, Any],
    model: Any,
    tokenizer: Tokenizer,
    device: torch.device,
) -> None:
    """Leave what an export, a reader or a later attempt needs to know."""
    content = yaml.safe_dump(loaded.config.model_dump(mode="json", by_alias=True), sort_keys=False)
    disk.write_bytes(run_dir.config, content.encode())
    disk.write_json(run_dir.origins, loaded.origins)
    disk.write_json(run_dir.path / "ds_config.json", settings)
    versions = {
        "dist_lm": dist_lm.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device_name(device),
    }
    disk.write_json(run_dir.path / "env.json", versions)
    with disk.disk_errors(run_dir.model):
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(run_dir.model)
        for name in TOKENIZER_FILES:
            if (tokenizer.path / name).is_file():
                shutil.copyfile(tokenizer.path / name, run_dir.model / name)
