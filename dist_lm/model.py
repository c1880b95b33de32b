"""Hugging Face models from a named size or from weights.

Enters: the model section and a tokenizer.  Leaves: an fp32 model on the CPU.
Promises: equal seeds give equal weights on every rank and for every ZeRO stage (DeepSpeed
partitions the finished model); nothing is fetched from a network and no remote code runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, BertConfig, PretrainedConfig, PreTrainedModel

from dist_lm.config import ModelSection
from dist_lm.data.tokenizer import Tokenizer
from dist_lm.errors import ConfigError, DataError

# Layers, hidden size, heads: the sizes of the BERT miniatures and of the original release.
BERT_SIZES: dict[str, tuple[int, int, int]] = {
    "tiny": (2, 128, 2),
    "mini": (4, 256, 4),
    "small": (4, 512, 8),
    "base": (12, 768, 12),
    "large": (24, 1024, 16),
}


def new_config(section: ModelSection, tokenizer: Tokenizer, *, positions: int) -> PretrainedConfig:
    """Config of a new BERT of the named size for this vocabulary and sequence length."""
    layers, hidden_size, heads = BERT_SIZES[section.size]
    fields: dict[str, Any] = {
        "vocab_size": tokenizer.vocab_size,
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden_size,
        "max_position_embeddings": max(positions, 512),
        "pad_token_id": tokenizer.pad_id,
    }
    unknown = set(section.overrides) - set(BertConfig().to_dict())
    if unknown:
        raise ConfigError(
            f"BERT's config has no field {', '.join(sorted(unknown))}",
            where="model.overrides",
            do="Use the field names of transformers.BertConfig, such as hidden_dropout_prob.",
        )
    fields.update(section.overrides)
    if fields["hidden_size"] % fields["num_attention_heads"]:
        raise ConfigError(
            f"hidden_size {fields['hidden_size']} cannot be divided among "
            f"{fields['num_attention_heads']} attention heads",
            where="model.overrides",
            do="Choose a hidden_size that is a multiple of num_attention_heads.",
        )
    return BertConfig(**fields)


def build(
    section: ModelSection,
    tokenizer: Tokenizer,
    auto_class: Any,
    *,
    positions: int,
    seed: int,
    **head: Any,
) -> PreTrainedModel:
    """A model of `auto_class`: new from the section's size, or from the section's weights.

    `head` fields (such as num_labels) go into the config.  Weights that a folder lacks, such as
    the head of a new task, are drawn from `seed`.
    """
    torch.manual_seed(seed)
    if section.weights is None:
        config = new_config(section, tokenizer, positions=positions)
        config.update(head)
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32)
        return model
    if section.overrides:
        raise ConfigError(
            "model.overrides has no effect beside model.from",
            where="model.overrides",
            why="The folder's own config.json decides the model's shape.",
            do="Remove model.overrides, or remove model.from to begin with new weights.",
        )
    return load(section.weights, auto_class, tokenizer, positions=positions, **head)


def load(folder: Path, auto_class: Any, tokenizer: Tokenizer, *, positions: int, **head: Any) -> PreTrainedModel:
    """The model in a Hugging Face folder, as fp32, checked against the tokenizer."""
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not a Hugging Face model folder",
            where="model.from",
            why="It has no config.json.",
            do="Make one from a run with `dist-lm export RUN --out FOLDER`.",
        )
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if config.vocab_size != tokenizer.vocab_size:
        raise DataError(
            f"the model knows {config.vocab_size} tokens, the tokenizer has {tokenizer.vocab_size}",
            where=f"{folder} and {tokenizer.path}",
            do="Use the tokenizer that the model was trained with; an exported folder holds it.",
        )
    room = getattr(config, "max_position_embeddings", positions)
    if positions > room:
        raise DataError(
            f"rows of {positions} tokens do not fit a model with {room} positions",
            where=str(folder),
            do=f"Prepare the data with --seq-len {room} or less.",
        )
    config.update(head)
    model: PreTrainedModel = auto_class.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
    )
    return model


def decay_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two parameter groups: matrices decay, biases and normalisation weights (1-D) do not."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    decayed = [parameter for parameter in trainable if parameter.dim() > 1]
    plain = [parameter for parameter in trainable if parameter.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
