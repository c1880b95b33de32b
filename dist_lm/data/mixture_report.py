"""What a run will read of each of its sources.

Enters: a TrainingSet, the steps of a run and the rows of a step.  Leaves: text for people.
Promises: the figures are those of the order that the run will read in; only manifests are read.
"""

from __future__ import annotations

import numpy as np

from dist_lm.data.location import redact
from dist_lm.data.training_set import TrainingSet


def mixture_report(data: TrainingSet, *, steps: int, global_rows: int) -> str:
    """Size, share of the tokens and epochs of each source, and the shares in each stage."""
    names = [source.name for source in data.sources]
    tokens_a_row = np.array([source.view.tokens_a_row for source in data.sources])
    rows = data.mixture.read_before(steps * global_rows)
    tokens = rows * tokens_a_row
    lines = [f"{steps} steps of {global_rows} rows: {int(tokens.sum())} tokens"]
    for source, read, share in zip(data.sources, rows, tokens / max(tokens.sum(), 1), strict=True):
        view = source.view
        lines.append(
            f"{source.name}: {view.num_rows} rows, {round(view.num_rows * view.tokens_a_row)} tokens; "
            f"{share:.1%} of what is read, {read / view.num_rows:.2f} epochs  ({redact(source.location)})"
        )
    if len(names) > 1:
        for position, counts in zip(data.mixture.starts, data.mixture.block_counts, strict=True):
            shares = counts * tokens_a_row / (counts * tokens_a_row).sum()
            listed = ", ".join(f"{name} {share:.1%}" for name, share in zip(names, shares, strict=True))
            lines.append(f"from step {position // global_rows + 1}: {listed} of the tokens")
    return "\n".join(lines)
