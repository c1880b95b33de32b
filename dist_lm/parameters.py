"""Which parameters are trained, at what rate, and with what decay.

Enters: a model and its settings.  Leaves: frozen parameters, and groups for the optimizer.
Promises: every trainable parameter is in exactly one group; a pattern that matches nothing is refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch

from dist_lm.config import ModelSection, OptimSection
from dist_lm.errors import ConfigError

# The place of a layer in a stack, in the names of all the models in transformers that have one.
_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.(\d+)\.")


def depths(module: torch.nn.Module) -> dict[str, int]:
    """Parameter -> depth: 0 below the first layer (embeddings), 1 for the first layer, and so on; the
    head and what else stands above a layer are one deeper than the last.

    Stacks that stand beside each other (encoder and decoder) count alike.
    """
    found: dict[str, int | None] = {}
    begun = False
    for name, _ in module.named_parameters():
        match = _LAYER.search(name)
        begun = begun or match is not None
        found[name] = int(match.group(1)) + 1 if match else None if begun else 0
    top = max((depth for depth in found.values() if depth is not None), default=0) + 1
    return {name: top if depth is None else depth for name, depth in found.items()}


def in_a_layer(name: str) -> bool:
    """Whether a parameter or module of this name stands in a layer of a stack."""
    return _LAYER.search(name) is not None


def freeze(module: torch.nn.Module, section: ModelSection, *, fresh: Collection[str]) -> None:
    """Stop the training of what the section names.

    `fresh`: names of parameters that the first weights lacked.  Raises ConfigError where nothing, all,
    or a fresh parameter is named.
    """
    names = [name for name, _ in module.named_parameters()]
    chosen: set[str] = set()
    for pattern in section.freeze:
        matched = {name for name in names if fnmatchcase(name, pattern)}
        if not matched:
            raise ConfigError(
                f"no parameter matches `{pattern}`",
                where="model.freeze",
                why=f"Names are such as {names[0]} and {names[-1]}.",
                do="Write a pattern with * for any characters.",
            )
        chosen |= matched
    if section.freeze_layers:
        depth_of = _layered(module, "model.freeze_layers")
        num_layers = max(depth_of.values()) - 1
        if section.freeze_layers > num_layers:
            raise ConfigError(
                f"the model has {num_layers} layers, not {section.freeze_layers}", where="model.freeze_layers"
            )
        chosen |= {name for name, depth in depth_of.items() if depth <= section.freeze_layers}
    random = sorted(chosen & set(fresh))
    if random:
        raise ConfigError(
            f"{random[0]} would stay random",
            where="model.freeze",
            why="The weights of model.from do not have it.",
            do="Freeze less.",
        )
    if chosen and len(chosen) == len(names):
        raise ConfigError("every parameter is frozen", where="model.freeze", do="Leave some of them out.")
    for name, parameter in module.named_parameters():
        if name in chosen:
            parameter.requires_grad_(False)


def frozen_sha256(module: torch.nn.Module) -> str:
    """Hash of all parameters that are not trained; empty where there are none.

    Checkpoints hold trained parameters only, so a run goes on only over the same frozen ones.
    """
    digest = hashlib.sha256()
    frozen = [(name, parameter) for name, parameter in module.named_parameters() if not parameter.requires_grad]
    for name, parameter in frozen:
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest() if frozen else ""


def groups(module: torch.nn.Module, optim: OptimSection) -> list[dict[str, Any]]:
    """Parameter groups: matrices decay, biases and normalisation weights (1-D) do not; with layer decay
    each depth has groups of its own.

    `lr_scale` of a group multiplies the schedule's learning rate (Engine.step).
    """
    depth_of = depths(module) if optim.layer_decay == 1.0 else _layered(module, "optim.layer_decay")
    top = max(depth_of.values())
    members: dict[tuple[int, bool], list[Any]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            depth = depth_of[name] if optim.layer_decay < 1.0 else top
            members.setdefault((depth, parameter.dim() > 1), []).append(parameter)
    return list(_groups(members, top, optim))


def _groups(members: dict[tuple[int, bool], list[Any]], top: int, optim: OptimSection) -> Iterator[dict[str, Any]]:
    for (depth, decays), parameters in sorted(members.items(), key=lambda item: (-item[0][0], not item[0][1])):
        scale = optim.layer_decay ** (top - depth)
        yield {
            "params": parameters,
            "weight_decay": optim.weight_decay if decays else 0.0,
            "lr": optim.lr * scale,
            "lr_scale": scale,
        }


def _layered(module: torch.nn.Module, key: str) -> dict[str, int]:
    depth_of = depths(module)
    if max(depth_of.values()) <= 1:
        raise ConfigError(
            "the model has no layers that are numbered",
            where=key,
            why="They are known by their names, such as `layer.3.`; models that share one layer have none.",
            do=f"Remove {key}.",
        )
    return depth_of
