"""A trained model, wherever it is: in a run's checkpoint or in a Hugging Face folder.

Enters: RUN, RUN@best, RUN@latest, RUN@1000, or a folder.  Leaves: the model in fp32 on the CPU, its
tokenizer, and the task that its head is for.
Promises: a checkpoint is verified before it is read; no ranks, no GPU and no network are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from dist_lm import lora
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.errors import ConfigError
from dist_lm.run_dir import RunDir
from dist_lm.run_model import choose_checkpoint, model_of_run, section_of

CLASSIFICATION, TOKEN_CLASSIFICATION = "classification", "token_classification"
QUESTION_ANSWERING, SEQ2SEQ, FILL_MASK = "question_answering", "seq2seq", "fill_mask"
CAUSAL_LM, INSTRUCTION = "causal_lm", "instruction"
_FAMILIES = {
    CLASSIFICATION: modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    TOKEN_CLASSIFICATION: modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    QUESTION_ANSWERING: modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    SEQ2SEQ: modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    FILL_MASK: modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    CAUSAL_LM: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
}


@dataclass(frozen=True)
class Trained:
    """A model with what is needed to use it."""

    model: PreTrainedModel
    tokenizer: Tokenizer
    task: str
    """What its head is for, one of the names above."""
    made: dict[str, Any]
    """How its inputs were made (Task.described); empty for a folder that dist_lm did not write."""
    where: str


def open_trained(location: str) -> Trained:
    """Raises ConfigError where nothing is there, DataError where it is damaged."""
    folder, selector = split_location(location)
    run_dir = RunDir(folder)
    if run_dir.identity.exists():
        checkpoint = choose_checkpoint(run_dir, selector)
        where = f"{folder} at step {checkpoint.progress.step}"
        return _trained(whole_model(run_dir, checkpoint), run_dir.model, where)
    if selector or not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is neither a run folder nor a Hugging Face folder",
            where="--from",
            do="Name a folder that `dist-lm train` or `dist-lm export` wrote; @best and @1000 belong to a run.",
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model = model_class(config, str(folder)).from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False, local_files_only=True, use_safetensors=True
    )
    return _trained(model, folder, str(folder))


def _trained(model: PreTrainedModel, tokenizer_folder: Path, where: str) -> Trained:
    made = dict(getattr(model.config, "dist_lm", None) or {})
    return Trained(model.eval(), load_tokenizer(tokenizer_folder), task_of(model, made, where), made, where)


def task_of(model: PreTrainedModel, made: dict[str, Any], where: str) -> str:
    """The task that the model's head is for."""
    name = type(model).__name__
    for task, family in _FAMILIES.items():
        if name in family.values():
            return INSTRUCTION if task == CAUSAL_LM and made.get("kind") == INSTRUCTION else task
    if name in modeling_auto.MODEL_FOR_PRETRAINING_MAPPING_NAMES.values():
        return FILL_MASK
    raise ConfigError(
        f"{name} has no head that predict and eval know",
        where=where,
        do=f"They know models for {', '.join(_FAMILIES)}.",
    )


def split_location(location: str) -> tuple[Path, str]:
    """Folder and what stands behind the @, if anything does."""
    if Path(location).exists():
        return Path(location), ""
    folder, _, selector = location.rpartition("@")
    if not folder:
        raise ConfigError(f"{location} does not exist", do="Name a run folder or a Hugging Face folder.")
    if selector not in ("best", "latest") and not selector.isdecimal():
        raise ConfigError(f"{location}: `{selector}` is no step", do="Write RUN@best, RUN@latest or RUN@1000.")
    return Path(folder), selector


def model_class(config: Any, where: str) -> Any:
    """The class that a config names.  Raises ConfigError where it names none of transformers."""
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise ConfigError(
            f"the model's class {names[0] if names else ''} is unknown to transformers {transformers.__version__}",
            where=where,
            do="Use a folder whose config.json names `architectures` that transformers has.",
        )
    return found


def whole_model(run_dir: RunDir, checkpoint: Checkpoint) -> PreTrainedModel:
    """The run's model with the checkpoint's weights, adapters merged into those that they adapt."""
    model = model_of_run(run_dir, checkpoint)
    if section_of(run_dir).lora.rank:
        lora.merge(model)
    return model


def fresh_model(folder: Path) -> PreTrainedModel:
    """A model of the folder's config, weights not trained, fp32."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    model: PreTrainedModel = model_class(config, str(folder))._from_config(config, dtype=torch.float32)
    return model.eval()
