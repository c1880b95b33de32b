"""Activations of Hugging Face models as one operation.

Enters: a model.  Leaves: the same model, whose activations keep no intermediate tensors.
Promises: the same function to rounding; no parameter, name or field of the config changes, so that what is exported is
the model as Hugging Face has it.

GPT-2, T5 1.1 and ALBERT write the tanh approximation of GELU out: eight passes over the widest tensor of a layer, most
of them kept for the backward pass (docs/performance.md has what that costs).
"""

from __future__ import annotations

from torch import nn
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

_WRITTEN_OUT = (NewGELUActivation, FastGELUActivation)
"""transformers says of both that GELUTanh is the same but for rounding."""


def fuse(model: nn.Module) -> int:
    """Put torch's own kernel in the place of each written-out activation; returns how many there were."""
    replaced = 0
    for parent in model.modules():
        for name, child in parent.named_children():
            if isinstance(child, _WRITTEN_OUT):
                setattr(parent, name, GELUTanh())
                replaced += 1
    return replaced
