"""An ordinary Hugging Face folder from a checkpoint.

Enters: a run folder.  Leaves: model.safetensors, config.json, tokenizer files and a model card.
Promises: the folder was loaded again with plain transformers; its parameter names are those of a
fresh model and its logits those of the weights in the checkpoint.  One process, no ranks, no GPU.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from dist_lm import disk
from dist_lm.checkpoint.commit import Checkpoint, Reader
from dist_lm.checkpoint.store import open_store, step_name
from dist_lm.errors import ConfigError, DataError
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir

_PROBE_TEXT = "Return the number of items in the list, or raise an error if it is empty."
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Exported:
    """What an export wrote and how it was checked."""

    folder: Path
    step: int
    architecture: str
    num_parameters: int
    largest_logit_difference: float
    """Between the checkpoint's weights and the reloaded folder, on one text."""


def export(run: Path, out: Path, *, step: int | None = None, dtype: str = "fp32") -> Exported:
    """Write the newest checkpoint of `run`, or that of `step`, to the new folder `out`.

    Raises ConfigError where `run` is no run folder or `out` exists, DataError where the checkpoint is
    damaged or the written folder does not load to the same model.
    """
    run_dir = RunDir(run)
    if not run_dir.identity.exists():
        raise ConfigError(f"{run} is not a run folder", do="Name a folder that `dist-lm train` wrote.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already", where="--out", do="Choose a new folder.")
    checkpoint = _choose(run_dir, step)
    model = _model_with(checkpoint, run_dir)
    reference = _logits(model, run_dir.model)
    hidden = out.with_name(f".tmp-{out.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    with disk.disk_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        # save_original_format: the names of today, not those of the first TensorFlow release.
        model.to(_DTYPES[dtype]).save_pretrained(hidden, save_original_format=False)
        AutoTokenizer.from_pretrained(run_dir.model, local_files_only=True).save_pretrained(hidden)
        (hidden / "README.md").write_text(_model_card(run_dir, checkpoint, model))
        difference = _check(hidden, model, reference, tolerance=0.0 if dtype == "fp32" else 0.1)
        if out.exists():
            out.rmdir()
        hidden.rename(out)
    return Exported(
        out,
        checkpoint.progress.step,
        type(model).__name__,
        sum(parameter.numel() for parameter in model.parameters()),
        difference,
    )


def _choose(run_dir: RunDir, step: int | None) -> Checkpoint:
    store = open_store(run_dir.checkpoint_location())
    names = [name for name in store.names() if step is None or name == step_name(step)]
    if not names:
        saved = ", ".join(store.names()) or "none"
        raise ConfigError(
            f"{run_dir.path} has no checkpoint" + (f" of step {step}" if step is not None else ""),
            why=f"Checkpoints: {saved}.",
            do="Name one of these steps, or train until the first one is saved.",
        )
    checkpoint = Checkpoint.read(store, names[0])
    damage = checkpoint.damage(sorted(checkpoint.files))
    if damage:
        raise DataError(f"{checkpoint.folder} is damaged: {damage}", do="Name an earlier step with RUN@STEP.")
    return checkpoint


def _model_class(config: Any) -> Any:
    return getattr(transformers, config.architectures[0])


def _fresh(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    model: PreTrainedModel = _model_class(config)._from_config(config, dtype=torch.float32)
    return model.eval()


def _model_with(checkpoint: Checkpoint, run_dir: RunDir) -> PreTrainedModel:
    model = _fresh(run_dir.model)
    reader = Reader(checkpoint)
    parameters = dict(model.named_parameters())
    reader.expect({name: tuple(parameter.shape) for name, parameter in parameters.items()})
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(reader.weight(name))
    return model


@torch.no_grad()
def _logits(model: PreTrainedModel, tokenizer_folder: Path) -> Tensor:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    output = model(**tokenizer(_PROBE_TEXT, return_tensors="pt"))
    logits: Tensor = output["prediction_logits"] if "prediction_logits" in output else output["logits"]
    return logits.float()


def _check(folder: Path, model: PreTrainedModel, reference: Tensor, *, tolerance: float) -> float:
    """Load the folder as a stranger would; largest difference of a logit."""
    from safetensors import safe_open

    written: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            written |= set(content.keys())
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    expected = set(_fresh(folder).state_dict()) - tied
    if written - tied != expected:
        wrong = sorted((written - tied) ^ expected)
        raise DataError(
            f"the exported folder has other parameter names than a fresh model: {wrong[:3]}",
            where=str(folder),
            do="This is a defect of dist_lm with this model; please report it.",
        )
    loaded = type(model).from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    difference = float((_logits(loaded, folder) - reference).abs().max())
    if difference > tolerance * float(reference.abs().max()):
        raise DataError(
            f"the exported folder computes other logits (largest difference {difference:.3g})",
            where=str(folder),
            do="This is a defect of dist_lm with this model; please report it.",
        )
    return difference


def _model_card(run_dir: RunDir, checkpoint: Checkpoint, model: PreTrainedModel) -> str:
    identity = json.loads(run_dir.identity.read_text())
    evaluations = read_metrics(run_dir.metrics, "eval")
    figures = evaluations[-1] if evaluations else {}
    rows = "\n".join(
        f"| {name} | {value:.4f} |" for name, value in figures.items() if name not in ("kind", "step", "time")
    )
    progress = checkpoint.progress
    return f"""---
library_name: transformers
tags: [dist_lm]
---
# {type(model).__name__}

Trained with dist_lm for {progress.step:,} steps on {progress.tokens:,} tokens
({progress.world_size} ranks, ZeRO-{progress.zero_stage}, {progress.precision}).

| held-out figure | value |
|---|---|
{rows}

Task: `{identity.get("task.name")}`.  Training data: `{identity.get("data.train")}` (fingerprint).
"""
