"""LoRA by peft: adapters put into a model, merged into its weights, or saved alone.

Enters: a model and the settings.  Leaves: the same model; what the adapters adapt is frozen.
Promises: parameters keep their Hugging Face names (peft puts `.base_layer` into those it wraps); a
head that the first weights lacked is trained as a whole; a saved adapter loads with
`peft.PeftModel.from_pretrained`.  peft is an optional package: without it LoRA is refused by name.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dist_lm.config import LoraSection
from dist_lm.disk import disk_errors
from dist_lm.errors import ConfigError, EnvironmentFault
from dist_lm.parameters import in_a_layer

ADAPTER = "default"
_PEFT_PREFIX = "base_model.model."


def attach(model: PreTrainedModel, section: LoraSection, *, fresh: Collection[str]) -> None:
    """Put adapters into the model, in place; none where the rank is 0.

    `fresh`: names of parameters that the first weights lacked.  Raises ConfigError where a name
    matches nothing, EnvironmentFault without peft.
    """
    if not section.rank:
        return
    trained = {*fresh, *_named(model, section.train_too)}
    targets = _targets(model, section, trained)
    peft = _peft()
    peft.inject_adapter_in_model(_peft_config(section, targets), model, adapter_name=ADAPTER)
    for name, parameter in model.named_parameters():
        if name in trained:
            parameter.requires_grad_(True)


def merge(model: PreTrainedModel) -> None:
    """Add the adapters to the weights that they adapt and take them out, in place.

    The model has the parameter names of a fresh one again.
    """
    for name, module in _adapted(model):
        module.merge(safe_merge=True)
        model.set_submodule(name, module.get_base_layer())


def save_adapter(model: PreTrainedModel, section: LoraSection, folder: Path, *, base: Path) -> None:
    """Write adapters, and modules that were trained as a whole, as a folder that peft reads.

    `base`: the Hugging Face folder that they belong on.
    """
    tensors: dict[str, torch.Tensor] = {}
    whole: set[str] = set()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if f".{ADAPTER}." not in name:
                whole.add(name.rpartition(".")[0])
            key = name.replace(f".{ADAPTER}.", ".")
            tensors[_PEFT_PREFIX + key] = parameter.detach().cpu().contiguous()
    config = _peft_config(section, [name for name, _ in _adapted(model)])
    config.modules_to_save = sorted(whole) or None
    config.base_model_name_or_path = str(base)
    config.inference_mode = True
    with disk_errors(folder, "write an adapter"):
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(folder))
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def _targets(model: PreTrainedModel, section: LoraSection, trained: Collection[str]) -> list[str]:
    """Names of the linear layers that get adapters."""
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    free = [name for name in linear if f"{name}.weight" not in trained]
    if not section.targets:
        return [name for name in free if in_a_layer(name)]
    chosen = [name for name in free if name.rpartition(".")[2] in section.targets]
    known = sorted({name.rpartition(".")[2] for name in linear})
    _refuse_unknown(section.targets, {name.rpartition(".")[2] for name in chosen}, known, "model.lora.targets")
    return chosen


def _named(model: PreTrainedModel, last_parts: tuple[str, ...]) -> set[str]:
    """Parameters of the modules whose names end so."""
    modules = {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in last_parts}
    known = sorted({part for name, _ in model.named_modules() if not (part := name.rpartition(".")[2]).isdigit()})
    _refuse_unknown(last_parts, {name.rpartition(".")[2] for name in modules}, known, "model.lora.train_too")
    return {f"{name}.{part}" for name, module in modules.items() for part, _ in module.named_parameters()}


def _refuse_unknown(wanted: tuple[str, ...], found: set[str], known: list[str], key: str) -> None:
    unknown = [name for name in wanted if name not in found]
    if unknown:
        raise ConfigError(
            f"the model has no module {', '.join(unknown)}", where=key, do=f"Use some of {' '.join(known)[:300]}."
        )


def _peft_config(section: LoraSection, targets: list[str]) -> Any:
    return _peft().LoraConfig(
        r=section.rank, lora_alpha=section.alpha, lora_dropout=section.dropout, target_modules=targets
    )


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise EnvironmentFault(
            "LoRA needs the package peft", where="model.lora.rank", do="pip install 'dist-lm[peft]'"
        ) from error
    return peft
