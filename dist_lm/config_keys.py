"""The dotted keys of RunConfig: which exist, and what a person meant who wrote another one.

Enters: section models and keys.  Leaves: names, values by dotted key, suggestions.
Promises: a key has one spelling, the one that YAML files use (`batch.global`, not `global_rows`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic.fields import FieldInfo

from dist_lm.config import RunConfig, Section

_CUTOFF = 0.75
"""Below this likeness difflib's guesses mislead: it maps `learning_rate` to `warmup_steps`."""

ALIASES = {
    "learning_rate": "optim.lr",
    "adam_beta1": "optim.betas",
    "adam_beta2": "optim.betas",
    "adam_epsilon": "optim.eps",
    "max_grad_norm": "optim.clip",
    "gradient_clipping": "optim.clip",
    "clip_grad": "optim.clip",
    "grad_clip": "optim.clip",
    "optimizer": "optim.name",
    "optimizer_name": "optim.name",
    "lr_scheduler": "optim.schedule.kind",
    "lr_scheduler_type": "optim.schedule.kind",
    "scheduler": "optim.schedule.kind",
    "warmup": "optim.schedule.warmup_steps",
    "num_warmup_steps": "optim.schedule.warmup_steps",
    "warmup_ratio": "optim.schedule.warmup_steps",
    "min_lr_ratio": "optim.schedule.final_share",
    "per_device_train_batch_size": "batch.micro",
    "train_micro_batch_size_per_gpu": "batch.micro",
    "micro_batch_size": "batch.micro",
    "micro_rows": "batch.micro",
    "batch_size": "batch.global",
    "train_batch_size": "batch.global",
    "global_batch_size": "batch.global",
    "global_rows": "batch.global",
    "max_steps": "run.steps",
    "num_steps": "run.steps",
    "total_steps": "run.steps",
    "max_train_steps": "run.steps",
    "output_dir": "run.dir",
    "run_dir": "run.dir",
    "logging_steps": "run.log_every",
    "steps_per_print": "run.log_every",
    "eval_steps": "run.eval_every",
    "save_steps": "run.save_every",
    "save_interval": "run.save_every",
    "save_total_limit": "run.keep",
    "random_seed": "run.seed",
    "model_name_or_path": "model.from",
    "base_model": "model.from",
    "pretrained": "model.from",
    "weights": "model.from",
    "model_type": "model.family",
    "config_name": "model.config",
    "config_overrides": "model.overrides",
    "tokenizer_name": "data.tokenizer",
    "tokenizer_path": "data.tokenizer",
    "train_file": "data.train",
    "train_data": "data.train",
    "dataset": "data.train",
    "datasets": "data.train",
    "validation_file": "data.heldout",
    "eval_dataset": "data.heldout",
    "eval": "data.heldout",
    "task_name": "task.name",
    "mlm_probability": "task.mask_probability",
    "mask_prob": "task.mask_probability",
    "mask": "task.mask_unit",
    "whole_word_mask": "task.mask_unit",
    "nsp": "task.pair",
    "next_sentence": "task.pair",
    "mean_noise_span_length": "task.mean_span",
    "gradient_checkpointing": "model.activation_checkpointing",
    "attn_implementation": "model.attention",
    "lora_r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "target_modules": "model.lora.targets",
    "modules_to_save": "model.lora.train_too",
    "layerwise_lr_decay": "optim.layer_decay",
    "bf16": "precision",
    "fp16": "precision",
    "dtype": "precision",
    "torch_dtype": "precision",
    "zero_stage": "zero",
    "sp_size": "sequence_parallel_size",
    "sequence_parallel_degree": "sequence_parallel_size",
    "context_parallel_size": "sequence_parallel_size",
    "zero_optimization": "zero",
    "deepspeed_config": "deepspeed",
    "ds_config": "deepspeed",
    "placement_strategy": "ray.placement",
}
"""Last part of a key in Hugging Face, DeepSpeed, axolotl or our own Python names -> our key."""

ELSEWHERE = {
    "gradient_accumulation_steps": "it follows from batch.global, batch.micro and the number of ranks",
    "num_train_epochs": "a run has run.steps",
    "num_epochs": "a run has run.steps",
    "epochs": "a run has run.steps",
    "world_size": "the launcher decides it",
    "num_gpus": "the launcher decides it",
    "num_workers": "ray.workers says it under Ray, and the launcher elsewhere",
    "local_rank": "the launcher decides it",
}
"""Keys of others that have no counterpart, and why."""


def public_fields(section: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a section under the names that YAML files use."""
    return {info.alias or name: info for name, info in section.model_fields.items()}


def sections_in(annotation: Any) -> list[type[Section]]:
    """The section, or the variants of a section, that an annotation stands for."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def variant(sections: list[type[Section]], name: object) -> type[Section] | None:
    """The section whose `name` may be `name`; the only one where there is one."""
    if len(sections) == 1:
        return sections[0]
    return next((section for section in sections if name in names_of(section)), None)


def names_of(section: type[Section]) -> tuple[str, ...]:
    """The values of the `name` field that choose this variant."""
    return tuple(get_args(section.model_fields["name"].annotation))


def task_names() -> list[str]:
    """Every task that `task.name` may be."""
    sections = sections_in(RunConfig.model_fields["task"].annotation)
    return [name for section in sections for name in names_of(section)]


def flatten(config: Section) -> dict[str, Any]:
    """Every value by its dotted key, in the order of the models."""
    return dict(_flatten(config, ()))


def _flatten(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Section):
        fields = type(value).model_fields
        items = {info.alias or name: getattr(value, name) for name, info in fields.items()}
    elif isinstance(value, dict) and value:
        items = value
    else:
        yield ".".join(path), value
        return
    for name, item in items.items():
        yield from _flatten(item, (*path, str(name)))


def fields_by_key(section: type[Section] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Every dotted key of a value that may exist, in any variant."""
    fields: dict[str, FieldInfo] = {}
    for name, info in public_fields(section).items():
        inner = sections_in(info.annotation)
        for part in inner:
            fields |= fields_by_key(part, f"{prefix}{name}.")
        if not inner:
            fields[prefix + name] = info
    return fields


def suggestion(key: str, siblings: list[str]) -> str:
    """What to do about the unknown dotted `key`, whose section has `siblings`; at most two lines."""
    section, _, written = key.rpartition(".")
    name = written.lower().replace("-", "_")
    valid = f"valid: {' '.join(siblings)}"
    if name in ELSEWHERE:
        return f"remove it: {ELSEWHERE[name]}"
    everywhere = list(fields_by_key())
    local = [f"{section}.{sibling}" if section else sibling for sibling in siblings]
    close = difflib.get_close_matches(name, siblings, n=1, cutoff=_CUTOFF)
    exact = [other for other in everywhere if other.rpartition(".")[2] == name]
    if ALIASES.get(name, key) != key:
        meant = ALIASES[name]
    elif exact:
        meant = exact[0]
    elif close:
        meant = local[siblings.index(close[0])]
    else:
        last_parts = {other.rpartition(".")[2]: other for other in everywhere}
        far = difflib.get_close_matches(name, last_parts, n=1, cutoff=_CUTOFF)
        if not far:
            return valid
        meant = last_parts[far[0]]
    return f"did you mean `{meant}`?\n{valid}"
