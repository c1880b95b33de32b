"""From HF Trainer as it comes to dist_lm on one GPU: a ladder of one change a rung.

    python bench/gpu.py --model bert-base|gpt2|gpt-1.3b|llama-1b [--out bench/results/gpu-NAME.md]
    python bench/gpu.py --model gpt2 --device cpu --tiny --no-compile   (a trial without a GPU)

Each model is a part of its own, below ten minutes; without Ray.  How it measures: one process, random
tokens, --warm-up steps, then the median of --steps steps by events on the device; tokens a second are of
tokens that are not padding (padded rows are full to 0.6).  The last rung doubles the micro-batch while
that is faster.  MFU = tokens a second x FLOPs a token / peak; FLOPs a token: bench/gpu_models.py; peak: the
device's in bf16 (dist_lm/accelerators.py).  GEMM: the same over the fastest of some products of square
matrices, measured here.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.recorded import record
from dist_lm.worker import prepare_environment

ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}
MOST_DOUBLINGS = 4


def measured_gemm_tflops(device: Any) -> float:
    """Fastest of some bf16 products of square matrices."""
    import torch

    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024):
        first = torch.randn(size, size, device=device, dtype=torch.bfloat16)
        for _ in range(3):
            first @ first
        _wait(device)
        rounds = 20 if device.type == "cuda" else 3
        began = time.perf_counter()
        for _ in range(rounds):
            first @ first
        _wait(device)
        best = max(best, 2 * size**3 * rounds / (time.perf_counter() - began) / 1e12)
    return best


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def peak_tflops(device: Any) -> float | None:
    """By the name that the driver tells; None of a CPU or a device that is not listed."""
    import torch

    from dist_lm.accelerators import ACCELERATORS

    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name().lower()
    found = [each for each in ACCELERATORS.values() if each.name in name]
    return found[0].low_tflops if found else None


def ladder(options: argparse.Namespace, shape: Any, ranks: Any) -> list[dict[str, Any]]:
    import torch

    from bench.gpu_rungs import LADDER, measure

    def row(rung: Any, rows: int, name: str) -> dict[str, Any]:
        gc.collect()
        try:
            timing = measure(rung, shape, rows, ranks, steps=options.steps, warm_up=options.warm_up)
        except torch.OutOfMemoryError:
            return {"rung": name, "rows": rows, "out_of_memory": True}
        print(f"{name}: {timing.tokens / timing.step_s:,.0f} tokens/s", file=sys.stderr, flush=True)
        return {"rung": name, "rows": rows, **asdict(timing), "tokens_s": timing.tokens / timing.step_s}

    rungs = [rung for rung in LADDER if not (rung.compiled and options.no_compile)]
    found = [row(rung, options.rows or shape.rows, rung.name) for rung in rungs]
    best = found[-1]
    for _ in range(MOST_DOUBLINGS):
        more = row(rungs[-1], 2 * best["rows"], f"+ {2 * best['rows']} rows")
        if more.get("tokens_s", 0.0) <= best.get("tokens_s", 0.0):
            break
        found.append(more)
        best = more
    return found


def table(rows: list[dict[str, Any]], flops: dict[str, float], peak: float | None, gemm: float) -> str:
    kinds = list(flops)
    mfu = [f"MFU ({kind})" for kind in kinds] if peak else []
    head = ["rung", "rows", "tokens/s", "ratio to the rung above", *mfu, *(f"of GEMM ({kind})" for kind in kinds)]
    head += ["ms a step", "host ms", "GiB", "waits a step"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    before = None
    for row in rows:
        if row.get("out_of_memory"):
            lines.append(f"| {row['rung']} | {row['rows']} | out of memory" + " | " * (len(head) - 3) + " |")
            continue
        rates = [row["tokens_s"] * flops[kind] / 1e12 for kind in kinds]
        cells = [row["rung"], str(row["rows"]), f"{row['tokens_s']:,.0f}"]
        cells.append(f"{row['tokens_s'] / before:.2f}" if before else "")
        cells += [f"{rate / peak:.1%}" for rate in rates] if peak else []
        cells += [f"{rate / gemm:.1%}" for rate in rates]
        syncs = "" if row["syncs"] < 0 else str(row["syncs"])
        cells += [f"{row['step_s'] * 1e3:.1f}", f"{row['host_s'] * 1e3:.1f}", f"{row['memory_gib']:.1f}", syncs]
        lines.append(f"| {' | '.join(cells)} |")
        before = row["tokens_s"]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("bert-base", "gpt2", "gpt-1.3b", "llama-1b"), required=True)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a small model of the same kind, to try the script")
    parser.add_argument("--rows", type=int, default=0, help="of the first rungs; 0: those of the model")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--warm-up", type=int, default=10)
    parser.add_argument("--no-compile", action="store_true", help="on a CPU torch.compile takes minutes")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    if options.device == "cpu":
        os.environ |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    prepare_environment()
    import torch

    from bench.gpu_models import SHAPES, build, flops_a_token
    from dist_lm.cluster.local import free_port
    from dist_lm.ranks import Ranks, disconnect

    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("There is no GPU here.  Try the script with --device cpu --tiny.")
    os.environ["MASTER_PORT"] = str(free_port())
    ranks = Ranks.connect()
    shape = SHAPES[options.model].tiny() if options.tiny else SHAPES[options.model]
    flops = flops_a_token(build(shape), shape)
    gemm, peak = measured_gemm_tflops(ranks.device), peak_tflops(ranks.device)
    rows = ladder(options, shape, ranks)
    disconnect()
    device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "a CPU"
    said = f"{device}; GEMM {gemm:.2f} TFLOP/s measured, peak {peak or 'unknown'}; rows of {shape.seq_len} tokens; "
    said += ", ".join(f"{value / 1e9:.4f} GFLOP a token ({kind})" for kind, value in flops.items())
    if ranks.device.type == "cpu" or options.tiny:
        said = f"A TRIAL OF THE SCRIPT, NO FIGURE OF A GPU: {said}"
    figures = {"device": device, "trial": options.tiny or ranks.device.type == "cpu", "gemm_tflops": gemm}
    figures |= {"peak_tflops": peak, "flops_a_token": flops, "rows": rows}
    record(f"{options.model} on one device", f"{said}.\n\n{table(rows, flops, peak, gemm)}", figures, options.out)


if __name__ == "__main__":
    main()
