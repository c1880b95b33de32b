"""What would make a run fit that does not.

Enters: what a rank needs at ZeRO-3, and what is there.  Leaves: options, the cheapest first.
Promises: where no single option does, the error says by how much, and how many devices, or which, would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from dist_lm.accelerators import ACCELERATORS
from dist_lm.errors import ConfigError

HEADROOM = 0.9
"""Of a device's memory that a plan may fill: the allocator's fragments need the rest."""
_MOST_RANKS = 65_536


@dataclass(frozen=True)
class Need:
    """Of one rank at ZeRO-3; GiB."""

    total: float
    there: float
    ranks: int
    rows: int
    """Of a micro-batch."""
    activations: float
    recomputed: float | None
    """Activations with activation checkpointing; None: it is on already."""
    optimizer: float
    """That offload would take away; 0: it is on already."""
    total_on: Callable[[int], float]
    """Need on another number of ranks."""

    @property
    def room(self) -> float:
        return self.there * HEADROOM


def options(need: Need) -> list[str]:
    """Single changes that make it fit.  Raises ConfigError where there is none."""
    found = list(_options(need))
    if not found:
        why = (
            f"ZeRO-3 needs {need.total:.1f} GiB a rank: {need.total - need.room:.1f} GiB more than {HEADROOM:.0%} of "
            f"the {need.there:.1f} GiB that are there."
        )
        others = "shorter rows, a smaller model, LoRA, or activation checkpointing and offload together"
        do = f"Take {' or '.join([*_devices(need), others])}."
        raise ConfigError("the model fits by no option", where="model", why=why, do=do)
    return found


def _options(need: Need) -> Iterator[str]:
    rows = int((need.room - (need.total - need.activations)) / (need.activations / need.rows))
    if need.rows > 1 and rows >= 1:
        yield f"zero=3 batch.micro={rows}"
    if need.recomputed is not None:
        saved = need.activations - need.recomputed
        if need.total - saved <= need.room:
            yield f"zero=3 model.activation_checkpointing=true ({saved:.1f} GiB less)"
    if need.optimizer and need.total - need.optimizer <= need.room:
        yield f"zero=3 deepspeed=ds_configs/zero3_offload.json ({need.optimizer:.1f} GiB to the host)"


def _devices(need: Need) -> Iterator[str]:
    """More devices of this kind, or larger ones."""
    ranks = need.ranks
    while ranks < _MOST_RANKS and need.total_on(ranks) > need.room:
        ranks *= 2
    if need.total_on(ranks) <= need.room:
        yield f"{ranks} devices of this kind at zero=3"
    large = [each for each in ACCELERATORS.values() if each.memory_gib * HEADROOM >= need.total]
    if large:
        smallest = min(large, key=lambda device: device.memory_gib)
        yield f"as many of {need.total / HEADROOM:.0f} GiB or more ({smallest.name}: {smallest.memory_gib:g})"
