"""The language-model head of any architecture, at some positions only, and its loss in chunks.

Enters: a model with a head over the vocabulary, hidden states of the targets.  Leaves: sums of the
cross-entropy.
Promises: a head is used only after it gave the model's own logits on a trial input, so that scaled or
capped logits are not missed; the fp32 logits of a whole micro-batch never exist at one time, in the
forward nor in the backward pass.

Shapes: N targets, H hidden size, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Head:
    """Modules of a model that make logits of hidden states, one after the other."""

    modules: tuple[str, ...]
    """Names in the model, so that the head is that of any model of this architecture."""
    scale: float = 1.0
    """What hidden states are multiplied by first."""

    def fits(self, model: nn.Module) -> bool:
        names = {name for name, _ in model.named_modules()}
        return all(name in names for name in self.modules)

    def __call__(self, model: nn.Module, hidden_NH: Tensor) -> Tensor:
        result = hidden_NH if self.scale == 1.0 else hidden_NH * self.scale
        for name in self.modules:
            result = model.get_submodule(name)(result)
        return result


ENCODER_HEADS = (
    Head(("cls.predictions",)),  # BERT
    Head(("lm_head",)),  # RoBERTa, XLM-R, CamemBERT, MPNet
    Head(("predictions",)),  # ALBERT
    Head(("generator_predictions", "generator_lm_head")),  # ELECTRA's generator
    Head(("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector")),  # DistilBERT
    Head(("head", "decoder")),  # ModernBERT
)
_TRIAL_TOKENS = 8
_TRIAL_TOLERANCE = 1e-4
"""Of the largest logit: fp32 sums in another order."""


def decoder_heads(model: Any) -> tuple[Head, ...]:
    """What the head of a model that generates may be: its output embeddings, scaled or not."""
    output = model.get_output_embeddings()
    # Without a body of its own there are no hidden states to ask for, but in an encoder with a decoder.
    if output is None or (model.base_model is model and not model.config.is_encoder_decoder):
        return ()
    names = [name for name, module in model.named_modules() if module is output]
    width = getattr(model.config, "hidden_size", 1)
    return tuple(Head((name,), scale) for name in names[:1] for scale in (1.0, width**-0.5))


def find_head(
    model: nn.Module,
    heads: tuple[Head, ...],
    hidden_of: Callable[[], Tensor],
    logits_of: Callable[[], Tensor],
) -> Head | None:
    """The head that gives the model's own logits, or None: then all of them must be computed."""
    fitting = [head for head in heads if head.fits(model)]
    if fitting:
        with trial(model):
            hidden, logits = hidden_of(), logits_of()
            for head in fitting:
                own = head(model, hidden)
                if own.shape == logits.shape and close(own, logits):
                    return head
    log.warning(
        "%s has a head that dist_lm does not know: logits are computed at every position, which costs time and memory",
        type(model).__name__,
    )
    return None


def find_decoder_head(model: Any) -> Head | None:
    """The head of a causal model over the vocabulary, or None."""
    ids = torch.arange(_TRIAL_TOKENS)[None] % model.config.vocab_size
    return find_head(
        model,
        decoder_heads(model),
        lambda: model.base_model(input_ids=ids, use_cache=False).last_hidden_state,
        lambda: model(input_ids=ids, use_cache=False).logits,
    )


def _seen_by_decoder(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a causal model takes of a micro-batch.

    `row_positions` [B, T] are there where the model sees a part of the places only, and attention must know
    which documents the whole rows hold.
    """
    seen = {name: inputs[name] for name in ("input_ids", "position_ids") if name in inputs}
    if "row_positions" in inputs:
        document_BT = (inputs["row_positions"] == 0).cumsum(dim=1)
        seen["attention_mask"] = (document_BT[:, :, None] == document_BT[:, None, :]).tril()[:, None]
    return seen


def decoder_loss_sums(
    objective: str,
    model: Any,
    head: Head | None,
    inputs: Mapping[str, Tensor],
    *,
    chunk: int,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Sums of a causal model's loss at `target_places` [N] of the flattened rows, by `target_labels` [N]."""
    seen, places_N = _seen_by_decoder(inputs), inputs["target_places"]
    logits_of: Callable[[Tensor], Tensor] = nn.Identity()
    if head is None:
        found_NX = model(**seen, use_cache=False).logits.flatten(0, 1)[places_N]
    else:
        found_NX = model.base_model(**seen, use_cache=False).last_hidden_state.flatten(0, 1)[places_N]
        logits_of = partial(head, model)
    return loss_sums_in_chunks(
        objective, logits_of, found_NX, inputs["target_labels"], chunk=chunk, smoothing=smoothing
    )


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """Without dropout and gradients; the mode of the model comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def close(first: Tensor, second: Tensor) -> bool:
    difference = (first.float() - second.float()).abs().max()
    return bool(difference <= _TRIAL_TOLERANCE * second.float().abs().max())


def takes(module: nn.Module, name: str) -> bool:
    """Whether the forward pass of a module has an argument of this name."""
    return name in inspect.signature(module.forward).parameters


def loss_sums_in_chunks(
    objective: str,
    logits_of: Callable[[Tensor], Tensor],
    hidden_NH: Tensor,
    labels_N: Tensor,
    *,
    chunk: int,
    smoothing: float = 0.0,
) -> dict[str, Tensor]:
    """Loss (fp32) and correct predictions of N targets, as sums.

    Of more than `chunk` targets, logits are made `chunk` at a time, and made again in the backward
    pass: one more product with the head's matrix, in place of N x V numbers kept.
    """

    def sums_of(hidden_CH: Tensor, labels_C: Tensor) -> tuple[Tensor, Tensor]:
        logits_CV = logits_of(hidden_CH).float()
        loss = F.cross_entropy(logits_CV, labels_C, reduction="sum", label_smoothing=smoothing)
        # Less than half of argmax's time on a CPU.
        return loss, (logits_CV.detach().max(dim=-1).indices == labels_C).sum()

    if len(labels_N) <= chunk:
        loss, correct = sums_of(hidden_NH, labels_N)
        return {f"{objective}_loss": loss, f"{objective}_correct": correct}
    parts = list(zip(torch.split(hidden_NH, chunk), torch.split(labels_N, chunk), strict=True))
    if torch.is_grad_enabled():
        sums = [checkpoint(sums_of, hidden, labels, use_reentrant=False) for hidden, labels in parts]
    else:
        sums = [sums_of(hidden, labels) for hidden, labels in parts]
    losses, corrects = zip(*sums, strict=True)
    return {f"{objective}_loss": torch.stack(losses).sum(), f"{objective}_correct": torch.stack(corrects).sum()}
