"""Layers of a model compiled by torch.compile, where this machine can.

Enters: a model.  Leaves: the same model; its layers run compiled code after their first call.
Promises: the same mathematics; where the compiler does not work the model trains as it is, and the log
says so once; compiled code is kept in a folder that outlives the machine's start (worker.py names it).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import torch
from torch import nn

log = logging.getLogger(__name__)
_TRIAL_ELEMENTS = 64


def compile_layers(model: nn.Module) -> bool:
    """Compile each layer of each stack; False where the compiler does not work.

    Layer by layer: one compilation serves all layers of a stack, and a layer that cannot be compiled
    leaves the others alone.
    """
    failure = _trial(next(model.parameters()).device)
    if failure:
        log.warning("model.compile has no effect: torch.compile does not work here (%s)", failure)
        return False
    # A layer that fails later runs as it is; torch logs why.
    torch._dynamo.config.suppress_errors = True
    layers = [*_layers(model)] or [model]
    for layer in layers:
        layer.compile()
    log.info("model.compile: %d layers are compiled at their first use", len(layers))
    return True


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    """Members of the outermost stacks."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from _layers(child)


def _trial(device: torch.device) -> str:
    """Why nothing can be compiled for this device, whose compiler is its own; empty where it can."""
    try:
        values = torch.linspace(0.0, 1.0, _TRIAL_ELEMENTS, device=device)
        compiled = torch.compile(_curve, fullgraph=True)
        if not torch.allclose(compiled(values), _curve(values)):
            return "a compiled function gives other values"
    except Exception as error:
        # Whatever a compiler raises, from a missing g++ to a full disk, means the same here.
        return next(iter(str(error).strip().splitlines()), type(error).__name__)
    return ""


def _curve(values: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(values) * 2.0 + 1.0
