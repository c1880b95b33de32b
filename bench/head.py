"""The chunked head: time and memory of loss and gradients over a vocabulary, by chunk size.

    python bench/head.py [--targets 4096] [--hidden 768] [--vocab 50257] [--rounds 5]

How it measures: one process, fp32 on a CPU and bf16 on a GPU; sizes take turns, in an order that
rotates, after one round of warm-up.  `whole` is one chunk of all targets.  Memory: on a GPU what torch
allocated at most; on a CPU the largest block of logits, by arithmetic.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from dist_lm.tasks.heads import loss_sums_in_chunks

CHUNKS = (256, 512, 1024, 2048, 4096)


def one_pass(weight: torch.Tensor, hidden: torch.Tensor, labels: torch.Tensor, chunk: int) -> float:
    began = time.perf_counter()
    sums = loss_sums_in_chunks("lm", lambda part: part @ weight.T, hidden, labels, chunk=chunk)
    sums["lm_loss"].backward()
    weight.grad = hidden.grad = None
    if hidden.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--vocab", type=int, default=50257)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    weight = (torch.randn(options.vocab, options.hidden) * 0.02).to(device, dtype).requires_grad_()
    hidden = torch.randn(options.targets, options.hidden).to(device, dtype).requires_grad_()
    labels = torch.randint(options.vocab, (options.targets,), device=device)
    chunks = [*(chunk for chunk in CHUNKS if chunk < options.targets), options.targets]
    seconds: dict[int, list[float]] = {chunk: [] for chunk in chunks}
    peak: dict[int, float] = {}
    for turn in range(options.rounds + 1):
        for at in range(len(chunks)):
            chunk = chunks[(at + turn) % len(chunks)]
            if gpu:
                torch.cuda.reset_peak_memory_stats()
            taken = one_pass(weight, hidden, labels, chunk)
            peak[chunk] = torch.cuda.max_memory_allocated() / 2**30 if gpu else chunk * options.vocab * 4 / 2**30
            if turn:
                seconds[chunk].append(taken)
    whole = statistics.median(seconds[options.targets])
    print(f"{options.targets} targets, hidden {options.hidden}, vocabulary {options.vocab}, {device} {dtype}")
    print(f"{'chunk':>8} {'median ms':>10} {'to whole':>9} {'GiB':>6}")
    for chunk in chunks:
        name = "whole" if chunk == options.targets else str(chunk)
        median = statistics.median(seconds[chunk])
        print(f"{name:>8} {median * 1e3:10.1f} {median / whole:9.3f} {peak[chunk]:6.2f}")


if __name__ == "__main__":
    main()
