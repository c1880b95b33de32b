"""One rank of bench/step.py: all variants of one process group take turns, step by step.

    python bench/step_ranks.py PLAN.json        (RANK, WORLD_SIZE and their like are set)

Enters: a plan {group, model, rows, seq_len, accumulation, rounds, variants, leader, folder}.
Leaves: PLAN.json.RANK, {variant: [[wall, CPU seconds] of each step]}.
The order rotates; all ranks start each step together; two rounds warm up.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_lm.worker import prepare_environment

WARM_UP = 2
BATCHES = 8


def measure(scene: Any, packed: Any, plan: dict[str, Any], folder: Path) -> dict[str, list[tuple[float, float]]]:
    """`packed`: the scene of the variants whose samples share rows; the samples are those of `scene`."""
    import step_hf
    import step_variants
    import torch

    ranks, names = scene.ranks, plan["variants"]
    linear = torch.nn.functional.linear
    variants: dict[str, Callable[[int], None]] = {
        name: step_variants.build(packed if step_variants.packs(name) else scene, name) for name in names
    }
    # Stage 3 may put a slower one of its own there, for all variants of this process.
    assert torch.nn.functional.linear is linear
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in (*names, *filter(None, [plan["leader"]]))}

    def others(number: int) -> None:
        if number == 0:
            # Hundreds of thousands of objects of the imports: a collection in the middle of a step would show.
            gc.collect()
            gc.freeze()
        for index in range(len(names)):
            name = names[(index + number) % len(names)]
            ranks.barrier()
            began = step_hf.now()
            variants[name](number)
            if number >= WARM_UP:
                taken[name].append(step_hf.since(began))

    def after(number: int, seconds: tuple[float, float]) -> None:
        if number >= WARM_UP:
            taken[plan["leader"]].append(seconds)
        others(number)

    rounds = plan["rounds"] + WARM_UP
    if plan["leader"]:
        with_deepspeed = plan["leader"] == "hf_deepspeed"
        step_hf.lead(scene, folder, rounds=rounds, deepspeed=with_deepspeed, before=ranks.barrier, after=after)
    else:
        for number in range(rounds):
            others(number)
    return taken


def main() -> None:
    path = Path(sys.argv[1])
    plan = json.loads(path.read_text())
    prepare_environment()
    import torch

    torch.set_num_threads(1)
    import step_data
    from step_variants import Scene

    from dist_lm.ranks import Ranks, disconnect

    ranks = Ranks.connect()
    folder = Path(plan["folder"])
    rows, accumulation = plan["rows"], plan["accumulation"]
    scenes, padding = [], []
    for packing in (False, True):
        task, data = step_data.open_task(folder, plan["model"], plan["seq_len"], packing=packing)
        steps = step_data.load_steps(task, data, ranks, rows=rows, accumulation=accumulation, count=BATCHES)
        scenes.append(Scene(task, step_data.RECIPES[plan["model"]].model, steps, ranks, rows))
        padding.append(1 - sum(step.tokens for step in steps) / sum(step.slots for step in steps))
    taken = measure(*scenes, plan, folder)
    Path(f"{path}.{os.environ['RANK']}").write_text(json.dumps({"seconds": taken, "padding": padding}))
    ranks.barrier()
    disconnect()


if __name__ == "__main__":
    main()
