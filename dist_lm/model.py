"""Hugging Face models from a named size, from a config.json or from weights.

Enters: the model section and a tokenizer.  Leaves: an fp32 model on the CPU, with its frozen parts
and adapters.
Promises: equal seeds give equal weights on every rank and for every ZeRO stage (DeepSpeed
partitions the finished model); nothing is fetched from a network and no remote code runs.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from dist_lm import lora
from dist_lm.config import ModelSection
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.data.vocabulary import TOKENIZER_FILE
from dist_lm.errors import ConfigError, DataError
from dist_lm.model_sizes import POSITIONS, size_fields
from dist_lm.parameters import freeze

log = logging.getLogger(__name__)


def build(
    section: ModelSection,
    tokenizer: Tokenizer,
    auto_class: Any,
    *,
    family: str,
    positions: int,
    seed: int,
    **head: Any,
) -> PreTrainedModel:
    """A model of `auto_class`: new, or from the section's weights.

    `family`: where the section names none.  `positions`: tokens of the longest model input.  `head`
    fields (such as num_labels) go into the config.  Weights that a folder lacks, such as the head of
    a new task, are drawn from `seed`.
    """
    torch.manual_seed(seed)
    fresh: set[str] = set()
    if section.weights is None:
        model = _new(section, tokenizer, auto_class, family=section.family or family, positions=positions, head=head)
    else:
        if section.overrides or section.family:
            key = "model.overrides" if section.overrides else "model.family"
            raise ConfigError(
                f"{key} has no effect beside model.from",
                where=key,
                why="The folder's own config.json decides the model's shape.",
                do=f"Remove {key}, or remove model.from to begin with new weights.",
            )
        model, fresh = load(section.weights, auto_class, tokenizer, positions=positions, section=section, **head)
    if section.activation_checkpointing:
        if not model.supports_gradient_checkpointing:
            raise ConfigError(
                f"{type(model).__name__} cannot recompute its activations",
                where="model.activation_checkpointing",
                do="Set it to false; less memory is also used with a smaller batch.micro.",
            )
        # Without re-entrance: the other kind needs inputs that ask for gradients, which frozen embeddings do not.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    freeze(model, section, fresh=fresh)
    lora.attach(model, section.lora, fresh=fresh)
    return model


def load(
    folder: Path,
    auto_class: Any,
    tokenizer: Tokenizer,
    *,
    positions: int,
    section: ModelSection | None = None,
    **head: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """The model in a Hugging Face folder or a run folder, as fp32, checked against the tokenizer.

    Also the names of the parameters that the folder lacks, such as those of a new head.
    """
    from dist_lm.run_model import config_folder, weights_of_run

    section = section or ModelSection()
    place = config_folder(folder)
    config = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    if not section.resize_embeddings:
        _compare_vocabulary(place, config, tokenizer)
    _check_positions(
        config,
        positions,
        where=str(folder),
        do="Shorten the rows: data.seq_len for kind tokens, else --seq-len of `data prepare`; {room} tokens at most.",
    )
    config.update(head)
    model, info = _class_for(auto_class, config, where=str(folder)).from_pretrained(
        place if place == folder else None,
        config=config,
        state_dict=None if place == folder else weights_of_run(folder),
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        **_attention(section),
    )
    if section.resize_embeddings and config.vocab_size != tokenizer.vocab_size:
        # Here, and not later: ZeRO would have sharded them.
        model.resize_token_embeddings(tokenizer.vocab_size, mean_resizing=False)
    return model, {*info["missing_keys"]}


def new_config(section: ModelSection, tokenizer: Tokenizer, *, family: str, positions: int) -> PretrainedConfig:
    """Config of a new model for this vocabulary and sequence length."""
    if section.config is not None:
        fields = _read_config(section.config)
        family = fields.pop("model_type")
    else:
        fields = size_fields(family, section.size)
        if family in POSITIONS:
            fields["max_position_embeddings"] = max(positions, POSITIONS[family])
    if family == "roberta":
        # Its positions are numbered from the padding token's number on.
        fields["max_position_embeddings"] = max(positions, POSITIONS[family]) + tokenizer.pad_id + 1
    fields |= {"vocab_size": tokenizer.vocab_size, "pad_token_id": tokenizer.pad_id}
    for role in ("bos_token", "eos_token", "cls_token", "sep_token"):
        fields[f"{role}_id"] = tokenizer.special.get(role)
    if family == "t5":
        fields["decoder_start_token_id"] = tokenizer.pad_id
    try:
        known = AutoConfig.for_model(family)
    except ValueError as error:
        raise ConfigError(
            f"transformers knows no model of type {family}", where="model.config", why=str(error).splitlines()[0]
        ) from error
    unknown = set(section.overrides) - set(known.to_dict()) - set(known.attribute_map)
    if unknown:
        raise ConfigError(
            f"the config of {family} has no field {', '.join(sorted(unknown))}",
            where="model.overrides",
            do=f"Use the field names of transformers.{type(known).__name__}.",
        )
    # Names of the field's own and of the family stand for the same: the override counts.
    for name in section.overrides:
        fields.pop(known.attribute_map.get(name, name), None)
        for general, own in known.attribute_map.items():
            if own == name:
                fields.pop(general, None)
    return AutoConfig.for_model(family, **{**fields, **section.overrides})


def _new(
    section: ModelSection, tokenizer: Tokenizer, auto_class: Any, *, family: str, positions: int, head: dict[str, Any]
) -> PreTrainedModel:
    config = new_config(section, tokenizer, family=family, positions=positions)
    where = "model.config" if section.config else "model"
    _check_positions(config, positions, where=where, do="Set it to {needed} or more, or prepare shorter rows.")
    config.update(head)
    try:
        model: PreTrainedModel = auto_class.from_config(config, dtype=torch.float32, **_attention(section))
    except ValueError as error:
        raise ConfigError(
            f"transformers refuses a {family} of this shape for {auto_class.__name__}",
            where=where,
            why=" ".join(str(error).split())[:200],
            do="Change model.family, model.overrides or model.config.",
        ) from error
    return model


def _class_for(auto_class: Any, config: PretrainedConfig, *, where: str) -> Any:
    """The class that stands behind an auto class: only a class itself takes weights that are in memory."""
    if issubclass(auto_class, PreTrainedModel):
        return auto_class
    try:
        with torch.device("meta"):
            return type(auto_class.from_config(config))
    except ValueError as error:
        raise ConfigError(
            f"a {config.model_type} is no model for {auto_class.__name__}",
            where=where,
            do="Use a model of another architecture, or another task.",
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        fields: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read", where="model.config", why=str(error)) from error
    if not isinstance(fields.get("model_type"), str):
        raise ConfigError(f"{file} is not a Hugging Face config", where="model.config", why="It names no model_type.")
    for name in ("architectures", "transformers_version", "torch_dtype", "dtype"):
        fields.pop(name, None)
    return fields


def _attention(section: ModelSection) -> dict[str, Any]:
    return {} if section.attention == "auto" else {"attn_implementation": section.attention}


def _check_positions(config: PretrainedConfig, positions: int, *, where: str, do: str) -> None:
    room = getattr(config, "max_position_embeddings", None)
    if config.model_type in ("roberta", "xlm-roberta", "camembert") and room:
        room -= (config.pad_token_id or 0) + 1
    if room is not None and positions > room:
        raise DataError(
            f"model inputs of {positions} tokens do not fit a model with {room} positions",
            where=where,
            why="Places behind the last position have no embedding.",
            do=do.format(room=room, needed=positions),
        )


def _compare_vocabulary(folder: Path, config: PretrainedConfig, tokenizer: Tokenizer) -> None:
    """The tokens must mean what they meant; rows of the embeddings behind the last token are padding."""
    do = (
        "Use the tokenizer that the model was trained with (an exported folder holds it), "
        "or set model.resize_embeddings to true."
    )
    if config.vocab_size < tokenizer.vocab_size:
        raise DataError(
            f"the model knows {config.vocab_size} tokens, the tokenizer has {tokenizer.vocab_size}",
            where=f"{folder} and {tokenizer.path}",
            do=do,
        )
    if (folder / TOKENIZER_FILE).is_file():
        theirs = load_tokenizer(folder).vocabulary
        if theirs != tokenizer.vocabulary:
            differ = sum(theirs.get(token) != number for token, number in tokenizer.vocabulary.items())
            raise DataError(
                f"the model was trained with another tokenizer: {differ} tokens have other numbers",
                where=f"{folder} and {tokenizer.path}",
                do=do,
            )
    elif config.vocab_size != tokenizer.vocab_size:
        log.warning("the model has room for %d tokens, the tokenizer has %d", config.vocab_size, tokenizer.vocab_size)
