"""An ordinary Hugging Face folder from a checkpoint.

Enters: a run folder.  Leaves: model.safetensors, config.json, tokenizer files and a model card; LoRA
adapters are merged, or exported alone.
Promises: the folder was loaded again with plain transformers; its parameter names are those of a
fresh model and its logits those of the weights in the checkpoint.  An export that is killed leaves
nothing under the folder's name.  One process, no ranks, no GPU.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from dist_lm import disk, lora
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.errors import ConfigError, DataError
from dist_lm.faults import fault_point
from dist_lm.model_card import model_card
from dist_lm.run_dir import RunDir
from dist_lm.run_model import choose_checkpoint, model_of_run, section_of
from dist_lm.trained import fresh_model, split_location, whole_model

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


def export(run: str, out: Path, *, dtype: str = "fp32", max_shard_gb: float = 5.0) -> Exported:
    """Write the checkpoint that `run` names (RUN, RUN@best, RUN@latest, RUN@1000) to the new folder `out`.

    Weights are parted into files of up to `max_shard_gb` GB (10^9 bytes).  Raises ConfigError where
    `run` is no run folder or `out` exists, DataError where the checkpoint is damaged or the written
    folder does not load to the same model.
    """
    run_dir, checkpoint = _checkpoint_for(run, out)
    model = whole_model(run_dir, checkpoint)
    reference = _logits(model, run_dir.model)
    reached = partial(fault_point, rank=0, step=checkpoint.progress.step)
    with disk.whole_folder(out, reached) as hidden:
        # save_original_format: the names of today, not those of the first TensorFlow release.
        model.to(_DTYPES[dtype]).save_pretrained(
            hidden, save_original_format=False, max_shard_size=max(int(max_shard_gb * 1e9), 1)
        )
        reached("in_export")
        _save_tokenizer(run_dir, model, hidden)
        (hidden / "README.md").write_text(model_card(run_dir, checkpoint, model))
        difference = _check(hidden, model, reference, tolerance=0.0 if dtype == "fp32" else 0.1)
    return Exported(
        out,
        checkpoint.progress.step,
        type(model).__name__,
        sum(parameter.numel() for parameter in model.parameters()),
        difference,
    )


def export_adapter(run: str, out: Path) -> Exported:
    """Write the LoRA adapter of a run alone, for `peft.PeftModel.from_pretrained(base, out)`.

    Raises ConfigError where the run has none, and as `export` does.
    """
    run_dir, checkpoint = _checkpoint_for(run, out)
    section = section_of(run_dir)
    if not section.lora.rank or section.weights is None:
        raise ConfigError(
            f"{run_dir.path} has no adapter", where="--adapter", do="Leave --adapter out: the whole model is exported."
        )
    model = model_of_run(run_dir, checkpoint)
    adapted = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    reached = partial(fault_point, rank=0, step=checkpoint.progress.step)
    with disk.whole_folder(out, reached) as hidden:
        lora.save_adapter(model, section.lora, hidden, base=section.weights)
        reached("in_export")
    return Exported(out, checkpoint.progress.step, type(model).__name__, adapted, 0.0)


def _checkpoint_for(run: str, out: Path) -> tuple[RunDir, Checkpoint]:
    """The run and its checkpoint, once `out` is seen to be free."""
    folder, selector = split_location(run)
    run_dir = RunDir(folder)
    if not run_dir.identity.exists():
        raise ConfigError(f"{folder} is not a run folder", do="Name a folder that `dist-lm train` wrote.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already", where="--out", do="Choose a new folder.")
    return run_dir, choose_checkpoint(run_dir, selector)


def _save_tokenizer(run_dir: RunDir, model: PreTrainedModel, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run_dir.model, local_files_only=True)
    made = getattr(model.config, "dist_lm", None) or {}
    if made.get("chat_template") and not tokenizer.chat_template:
        # The template that the answers were learnt with, for whoever talks to the model.
        tokenizer.chat_template = made["chat_template"]
        tokenizer.eos_token = tokenizer.eos_token or tokenizer.sep_token
    if made.get("seq_len"):
        tokenizer.model_max_length = made["seq_len"]
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def _logits(model: PreTrainedModel, tokenizer_folder: Path) -> Tensor:
    """What the model says of one text, whatever its head says: [...]."""
    for tensor in (*model.parameters(), *model.buffers()):
        # Where a file's weights begin in memory depends on its header, and decides how sums are rounded.
        tensor.data = tensor.data.clone()
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    inputs = dict(tokenizer(_PROBE_TEXT, return_tensors="pt"))
    accepted = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = inputs["input_ids"]
    output = model(**inputs)
    names = [name for name in output if name.endswith("logits")]
    return torch.cat([output[name].flatten() for name in names]).float()


def _check(folder: Path, model: PreTrainedModel, reference: Tensor, *, tolerance: float) -> float:
    """Load the folder as a stranger would; largest difference of a logit."""
    from safetensors import safe_open

    written: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as content:
            written |= set(content.keys())
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    expected = set(fresh_model(folder).state_dict()) - tied
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
