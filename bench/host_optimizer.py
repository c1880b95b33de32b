"""AdamW on the host, for states that are offloaded to it: torch's fused kernel and DeepSpeed's CPU Adam in turns.

    python bench/host_optimizer.py [--elements 20_000_000] [--threads 1 2]

Enters: nothing; DeepSpeed's op is compiled where it is missing.  Leaves: a table, seconds of a step, medians.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

from dist_lm.worker import prepare_environment

STEPS, WARM_UP = 20, 4


def main() -> None:
    prepare_environment()
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=20_000_000)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    common: dict[str, Any] = {"lr": 1e-3, "weight_decay": 0.01}
    print("| threads | torch, s | DeepSpeed, s | torch / DeepSpeed |\n|---|---|---|---|")
    for threads in options.threads:
        torch.set_num_threads(threads)
        gradient = torch.randn(options.elements)
        parameters = [torch.nn.Parameter(torch.zeros(options.elements)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = gradient
        optimizers = torch.optim.AdamW(parameters[:1], fused=True, **common), DeepSpeedCPUAdam(parameters[1:], **common)
        seconds: list[list[float]] = [[], []]
        for _ in range(WARM_UP + STEPS):
            for optimizer, taken in zip(optimizers, seconds, strict=True):
                began = time.perf_counter()
                optimizer.step()
                taken.append(time.perf_counter() - began)
        ours, theirs = (median(taken[WARM_UP:]) for taken in seconds)
        print(f"| {threads} | {ours:.4f} | {theirs:.4f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
