"""Which ranks share rows, and which share the places of a row.

Enters: the number of ranks, `sequence_parallel_size`.  Leaves: a Mesh; a ConfigError where the two, or the
model's heads, do not fit.
Promises: the ranks of a group are neighbours, so that they are on one host where that can be; all of them
read the same rows, and no rank of another group does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dist_lm.config import RunConfig
from dist_lm.errors import ConfigError
from dist_lm.model_sizes import size_fields

KEY = "sequence_parallel_size"


@dataclass(frozen=True)
class Mesh:
    """One rank's place in a rectangle of data ranks x parts of a row."""

    data_rank: int = 0
    """Which share of the rows."""
    data_world_size: int = 1
    """Shares that a global batch has."""
    part: int = 0
    """Which part of each row."""
    parts: int = 1
    """`sequence_parallel_size`."""

    @classmethod
    def of(cls, rank: int, world_size: int, parts: int) -> Mesh:
        """Raises ConfigError where groups of `parts` ranks leave a rest."""
        if world_size % parts:
            raise ConfigError(
                f"{KEY} {parts} does not divide {world_size} ranks",
                where=KEY,
                why="Each group of so many ranks shares the places of its rows.",
                do=f"Start a multiple of {parts} ranks, or set {KEY} to a number that divides them.",
            )
        return cls(rank // parts, world_size // parts, rank % parts, parts)


def check_heads(config: RunConfig) -> None:
    """ConfigError where a new model of a named size has heads that its ranks cannot share.

    Other models are checked once they are built.
    """
    section, parts = config.model, config.sequence_parallel_size
    if parts == 1 or section.weights is not None or section.config is not None:
        return
    fields: dict[str, Any] = {**size_fields(section.family or "gpt2", section.size), **section.overrides}
    heads = int(fields.get("n_head", fields["num_attention_heads"]))
    refuse_heads(heads, int(fields.get("num_key_value_heads", heads)), parts)


def refuse_heads(heads: int, key_value_heads: int, parts: int) -> None:
    """ConfigError where `parts` ranks cannot have as many heads each."""
    for number, name in ((heads, "attention heads"), (key_value_heads, "heads of keys and values")):
        if number % parts:
            raise ConfigError(
                f"{KEY} {parts} does not divide the model's {number} {name}",
                where=KEY,
                why="Within attention each rank has whole rows, and its share of the heads.",
                do="Set it to a number that divides both kinds of heads, or take a model with others.",
            )
