"""Time to a held-out MLM loss on the docs corpus: HF Trainer and dist_lm, each at its best settings.

    python bench/end_to_end.py [--minutes 6] [--fp32] [--target LOSS] [--out bench/results/end_to_end.md]

How it measures: two CPU ranks, the same first weights (a BERT mini without dropout), data, seed, rows a
step, learning rate and optimizer; both in bf16 without padding.  Trainer: DDP with gloo, autocast, fused
AdamW, SDPA, no logging.  dist_lm: ZeRO-1, weights in bf16 with fp32 masters, head at masked positions.
With --fp32, for processors that only emulate bf16, both compute in fp32.
Both systems live at once and take turns of some seconds, in which the other is stopped; a system's clock
runs in its own turns, from its launch on, and evaluations count for both.  Held-out losses come from the
same rows under the same masks.  Without --target it is the best loss that both reached.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.docs_data import corpus, prepared
from bench.recorded import REPOSITORY, record
from bench.turns import EndedEarly, Program, take_turns
from dist_lm.metrics import read_metrics
from dist_lm.worker import prepare_environment

RANKS = 2
ROWS, SEQ_LEN, EVAL_EVERY, LR, WARM_UP, SEED = 32, 126, 25, 1e-3, 50, 1
STEPS = 100_000
"""More than there is time for."""
CORPUS_MB = 6


def first_weights(folder: Path, tokenizer: Path) -> Path:
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

    torch.manual_seed(SEED)
    shape = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    model = BertForMaskedLM(BertConfig(vocab_size=len(loaded), max_position_embeddings=128, **shape, **no_dropout))
    model.save_pretrained(folder / "model")
    loaded.save_pretrained(folder / "model")
    return folder / "model"


def trainer(
    folder: Path, model: Path, data: Path, tokenizer: Path, environment: dict[str, str], precision: str
) -> Program:
    settings = {
        "model": str(model),
        "data": str(data),
        "tokenizer": str(tokenizer),
        "out": str(folder / "hf.jsonl"),
        "seq_len": SEQ_LEN,
        "seed": SEED,
        "micro_rows": ROWS // RANKS,
        "steps": STEPS,
        "lr": LR,
        "precision": precision,
        "warmup_steps": WARM_UP,
        "eval_every": EVAL_EVERY,
    }
    script = REPOSITORY / "bench" / "end_to_end_hf.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    return Program([*launcher, str(script), json.dumps(settings)], folder / "hf.log", environment)


def ours(
    folder: Path, model: Path, data: Path, tokenizer: Path, environment: dict[str, str], precision: str
) -> Program:
    recipe = folder / "dist_lm.yaml"
    recipe.write_text(
        f"""
task: {{name: mlm, pair: none}}
model: {{from: {model}}}
data: {{train: {data}/train, heldout: {data}/heldout, tokenizer: {tokenizer}, seq_len: {SEQ_LEN}}}
batch: {{global: {ROWS}, micro: {ROWS // RANKS}}}
optim: {{lr: {LR}, weight_decay: 0.01, clip: 1.0, schedule: {{kind: constant, warmup_steps: {WARM_UP}}}}}
run: {{dir: {folder}/run, steps: {STEPS}, seed: {SEED}, log_every: {EVAL_EVERY}, eval_every: {EVAL_EVERY},
       save_every: {STEPS}}}
precision: {precision}
zero: 1
deepspeed: {REPOSITORY}/ds_configs/cpu_gloo.json
"""
    )
    command = [sys.executable, "-m", "dist_lm", "train", "-c", str(recipe), "--cpu", str(RANKS), "--max-restarts=0"]
    return Program(command, folder / "dist_lm.log", environment)


def curve(turns: Program, records: list[dict[str, Any]]) -> list[dict[str, float]]:
    return [
        {"seconds": round(turns.active_s(each["time"]), 1), "step": each["step"], "loss": round(each["mlm_loss"], 4)}
        for each in records
    ]


def reached(points: list[dict[str, float]], target: float) -> dict[str, float] | None:
    return next((point for point in points if point["loss"] <= target), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=6.0, help="of both systems together, without preparation")
    parser.add_argument("--turn", type=float, default=15.0, help="seconds")
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--target", type=float)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    precision = "fp32" if options.fp32 else "bf16"
    prepare_environment()
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // RANKS))}
    environment["PYTHONPATH"] = f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    with tempfile.TemporaryDirectory(prefix="dist_lm-end-to-end-") as name:
        folder = Path(name)
        data, tokenizer = prepared(folder, corpus(folder, CORPUS_MB))
        model = first_weights(folder, tokenizer)
        systems = {
            "HF Trainer": trainer(folder, model, data, tokenizer, environment, precision),
            "dist_lm": ours(folder, model, data, tokenizer, environment, precision),
        }
        parties = list(systems.values())
        try:
            take_turns(parties, options.turn, until=lambda: sum(p.seconds for p in parties) >= options.minutes * 60)
        except EndedEarly as error:
            raise SystemExit(str(error)) from None
        finally:
            for party in parties:
                party.end()
        lines = (folder / "hf.jsonl").read_text().splitlines() if (folder / "hf.jsonl").exists() else []
        theirs = [json.loads(line) for line in lines]
        records = {"HF Trainer": theirs, "dist_lm": read_metrics(folder / "run" / "metrics.jsonl", "eval")}
        for system, found in records.items():
            if not found:
                raise SystemExit(f"{system} came to no evaluation:\n{systems[system].log.read_text()[-2000:]}")
        curves = {system: curve(systems[system], found) for system, found in records.items()}
    report(curves, options.target, precision, options.out)


def report(curves: dict[str, list[dict[str, float]]], target: float | None, precision: str, out: Path | None) -> None:
    best = {system: min(point["loss"] for point in points) for system, points in curves.items()}
    target = max(best.values()) if target is None else target
    found = {system: reached(points, target) for system, points in curves.items()}
    lines = [f"| system | seconds to {target:.3f} | steps | steps in all | loss at the end |", "|---|---|---|---|---|"]
    for system, points in curves.items():
        at = found[system]
        cells = f"{at['seconds']:.0f} | {at['step']:.0f}" if at else "not reached | "
        lines.append(f"| {system} | {cells} | {points[-1]['step']:.0f} | {points[-1]['loss']:.3f} |")
    theirs, own = found["HF Trainer"], found["dist_lm"]
    ratio = own["seconds"] / theirs["seconds"] if theirs and own else None
    if ratio is not None:
        lines.append(f"\ndist_lm needs {ratio:.2f} of Trainer's time.")
    figures = {"target": target, "ratio": ratio, "curves": curves}
    record(f"Time to a held-out MLM loss of {target:.3f}, two CPU ranks, {precision}", "\n".join(lines), figures, out)


if __name__ == "__main__":
    main()
