"""The model of a run folder: the weights of a checkpoint over those that the run left as they were.

Enters: a run folder.  Leaves: a Hugging Face model, fp32, on the CPU.
Promises: checkpoints hold trained parameters only; the frozen ones come from the run's `model.from`,
and are those that the run was begun with, or it is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from dist_lm import lora, model
from dist_lm.checkpoint import commit
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.reader import Reader
from dist_lm.checkpoint.store import Store, open_store, step_name
from dist_lm.config import ModelSection, RunConfig
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.errors import ConfigError, DataError
from dist_lm.parameters import frozen_sha256
from dist_lm.run_dir import RunDir

FROZEN_KEY = "model.frozen"
"""Key of a run's identity: parameters.frozen_sha256."""
_HEAD_FIELDS = ("num_labels", "id2label", "label2id", "problem_type", "dist_lm")


def config_folder(folder: Path) -> Path:
    """Where the config.json of a Hugging Face folder or a run folder lies.  Raises ConfigError."""
    for place in (folder, RunDir(folder).model):
        if (place / "config.json").is_file():
            return place
    raise ConfigError(
        f"{folder} is neither a Hugging Face model folder nor a run folder",
        where="model.from",
        why="It has no config.json.",
        do="Name a folder that `dist-lm train` or `dist-lm export` wrote, or one of transformers.",
    )


def weights_of_run(run: Path) -> dict[str, Tensor]:
    """All weights of the newest checkpoint, adapters merged, by the names of a fresh model."""
    checkpoint = choose_checkpoint(RunDir(run))
    whole = model_of_run(RunDir(run), checkpoint)
    lora.merge(whole) if section_of(RunDir(run)).lora.rank else None
    return dict(whole.state_dict())


def choose_checkpoint(run_dir: RunDir, selector: str = "") -> Checkpoint:
    """A checkpoint of the run, whole: the newest one, or `best`, `latest`, or that of a step.

    Raises ConfigError where there is no such checkpoint, DataError where it is damaged.
    """
    store = open_store(run_dir.checkpoint_location())
    saved = store.names()
    step = _best_step(run_dir, store) if selector == "best" else int(selector) if selector.isdecimal() else None
    names = [name for name in saved if step is None or name == step_name(step)]
    if not names:
        raise ConfigError(
            f"{run_dir.path} has no checkpoint" + (f" of step {step}" if step is not None else ""),
            why=f"Checkpoints: {', '.join(saved) or 'none'}.",
            do="Name one of these steps, or train until the first one is saved.",
        )
    checkpoint = Checkpoint.read(store, names[0])
    damage = checkpoint.damage(sorted(checkpoint.files))
    if damage:
        raise DataError(f"{checkpoint.folder} is damaged: {damage}", do="Name an earlier step with RUN@STEP.")
    return checkpoint


def _best_step(run_dir: RunDir, store: Store) -> int:
    try:
        found = commit.best(store)
        if found is not None:
            return int(found["step"])
    except (ValueError, KeyError, TypeError) as error:
        where = f"{run_dir.checkpoint_location()}: {commit.BEST}"
        raise DataError("the note of the best checkpoint cannot be read", where=where, why=repr(error)) from error
    raise ConfigError(
        f"{run_dir.path} knows no best checkpoint",
        why="It is noted where the run evaluates and watches a metric (run.best).",
        do="Name RUN@latest or RUN@STEP.",
    )


def section_of(run_dir: RunDir) -> ModelSection:
    """The model section that the run was begun with."""
    return RunConfig.model_validate(yaml.safe_load(run_dir.config.read_text())).model


def model_of_run(run_dir: RunDir, checkpoint: Checkpoint) -> PreTrainedModel:
    """The run's model with the checkpoint's weights; adapters, if it has any, not merged.

    Raises DataError where the checkpoint is of another model, or frozen weights are no longer those
    of the run.
    """
    section = section_of(run_dir)
    config = AutoConfig.from_pretrained(run_dir.model, local_files_only=True)
    model_class = getattr(transformers, config.architectures[0])
    if section.trains_a_part:
        whole = _over_first_weights(run_dir, section, config, model_class)
    else:
        whole = model_class._from_config(config, dtype=torch.float32)
    trained = {name: parameter for name, parameter in whole.named_parameters() if parameter.requires_grad}
    reader = Reader(checkpoint)
    reader.expect({name: tuple(parameter.shape) for name, parameter in trained.items()})
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(reader.weight(name))
    return whole.eval()


def _over_first_weights(run_dir: RunDir, section: ModelSection, config: Any, model_class: Any) -> PreTrainedModel:
    head = {name: getattr(config, name) for name in _HEAD_FIELDS if getattr(config, name, None) is not None}
    whole = model.build(section, load_tokenizer(run_dir.model), model_class, family="", positions=0, seed=0, **head)
    begun_with = json.loads(run_dir.identity.read_text()).get(FROZEN_KEY)
    if frozen_sha256(whole) != begun_with:
        raise DataError(
            "the frozen weights are no longer those that the run was begun with",
            where=str(section.weights),
            why="Checkpoints hold trained weights only; the others are read from model.from.",
            do="Put the folder back as it was.",
        )
    return whole
