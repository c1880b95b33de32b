"""A training step of the demo's model: bare PyTorch, HF Trainer, and dist_lm at ZeRO 0 to 3.

    python bench/step.py [--rounds 12] [--rows 16] [--seq-len 96]

How it measures: one process, one thread, fp32.  All variants hold the same weights and train on the
same batches of real text (the language reference of Python); they take turns, step by step, in an
order that rotates, after two steps of warm-up.  HF Trainer's steps are timed by its own callbacks,
and the others take their turn inside them.  `bare` stands twice: where the two differ by more than
5 % (`aa`), the machine was too busy for the figures to be used.  `bare` and `hf_trainer` compute the
MLM head at every position, as Hugging Face's model does; `bare_masked` and dist_lm at the masked ones
only, with the same loss and gradients.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_lm.worker import prepare_environment

ENVIRONMENT = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}
WARM_UP = 2
LR, CLIP, DECAY = 1e-3, 1.0, 0.01
Step = Callable[[int], None]


def prepare_text(folder: Path, seq_len: int) -> None:
    from dist_lm.data.prepare import PrepareOptions, prepare
    from dist_lm.data.tokenizer import train_tokenizer

    texts = [topics[name] for name in sorted(topics)]
    source = folder / "topics.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_tokenizer(texts, vocab_size=6000, out=folder / "tokenizer")
    options = PrepareOptions(
        [str(source)], folder / "pairs", folder / "tokenizer", seq_len=seq_len, heldout_fraction=0.0, workers=1
    )
    prepare(options)


def load_batches(folder: Path, rows: int, count: int) -> tuple[Any, list[Any]]:
    from dist_lm.config import MlmTask, SourceSpec
    from dist_lm.data.stream import Stream
    from dist_lm.data.tokenizer import load_tokenizer
    from dist_lm.data.training_set import TrainingSet
    from dist_lm.tasks.mlm import MaskedLanguageModelling

    train = SourceSpec(path=str(folder / "pairs" / "train"))
    data = TrainingSet([train], seed=1, lanes=4, era=256)
    tokenizer = load_tokenizer(folder / "tokenizer")
    task = MaskedLanguageModelling(MlmTask(name="mlm"), tokenizer, data.view, seed=1)
    columns = task.partner_columns
    with Stream(data, global_rows=rows, rank=0, world_size=1, partner_columns=columns) as stream:
        return task, [task.collate(next(stream).rows) for _ in range(count)]


def new_model(task: Any) -> Any:
    from dist_lm.config import ModelSection

    return task.build_model(ModelSection(size="tiny"))


def dense_inputs(batch: Any) -> dict[str, Any]:
    """The batch as a plain Hugging Face model takes it."""
    import torch

    inputs = {name: batch.inputs[name] for name in ("input_ids", "token_type_ids", "attention_mask")}
    labels = torch.full(inputs["input_ids"].shape, -100)
    labels.view(-1)[batch.inputs["masked_positions"]] = batch.inputs["masked_labels"]
    return {**inputs, "labels": labels, "next_sentence_label": batch.inputs["pair_labels"]}


def bare(task: Any, batches: list[Any]) -> Step:
    """The loop that a person would write."""
    import torch

    from dist_lm.config import OptimSection
    from dist_lm.parameters import groups

    model = new_model(task).train()
    optimizer = torch.optim.AdamW(groups(model, OptimSection(lr=LR, weight_decay=DECAY)), lr=LR, fused=True)
    dense = [dense_inputs(batch) for batch in batches]

    def step(number: int) -> None:
        model(**dense[number % len(dense)]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def bare_masked(task: Any, batches: list[Any]) -> Step:
    """The bare loop with the head at masked positions only: the same work as dist_lm's."""
    import torch

    from dist_lm.config import OptimSection
    from dist_lm.parameters import groups

    model = new_model(task).train()
    optimizer = torch.optim.AdamW(groups(model, OptimSection(lr=LR, weight_decay=DECAY)), lr=LR, fused=True)

    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        sums = task.loss_sums(model, batch.inputs)
        sum(sums[f"{name}_loss"] / count for name, count in batch.targets.items()).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(task: Any, batches: list[Any], stage: int, ranks: Any) -> Step:
    """dist_lm's engine at one ZeRO stage."""
    from dist_lm.config import OptimSection
    from dist_lm.engine import Engine

    settings = {
        "train_micro_batch_size_per_gpu": len(batches[0].inputs["input_ids"]),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": 2_000_000,
            "allgather_bucket_size": 2_000_000,
            "overlap_comm": False,
        },
    }
    optim = OptimSection(lr=LR, clip=CLIP, weight_decay=DECAY)
    engine = Engine(new_model(task), task, optim=optim, deepspeed_settings=settings, ranks=ranks, seed=1)

    def step(number: int) -> None:
        batch = batches[number % len(batches)]
        targets = {name: float(count) for name, count in batch.targets.items()}
        engine.step([batch], global_targets=targets, learning_rate=LR, position=number)

    return step


def measure(
    variants: dict[str, Step], task: Any, batches: list[Any], rounds: int, folder: Path
) -> dict[str, list[float]]:
    """Seconds of each step of each variant; HF Trainer leads, the others run between its steps."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    seconds: dict[str, list[float]] = {name: [] for name in (*variants, "hf_trainer")}
    names = list(variants)

    class Rotation(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.round = 0
            self.began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            taken = {"hf_trainer": time.perf_counter() - self.began}
            for index in range(len(names)):
                name = names[(index + self.round) % len(names)]
                began = time.perf_counter()
                variants[name](self.round)
                taken[name] = time.perf_counter() - began
            if self.round >= WARM_UP:
                for name, value in taken.items():
                    seconds[name].append(value)
            self.round += 1

    class Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return rounds + WARM_UP

        def __getitem__(self, number: int) -> Any:
            return dense_inputs(batches[number % len(batches)])

    arguments = TrainingArguments(
        output_dir=str(folder / "hf"),
        per_device_train_batch_size=1,
        max_steps=rounds + WARM_UP,
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=new_model(task),
        args=arguments,
        train_dataset=Batches(),
        data_collator=lambda items: items[0],
        callbacks=[Rotation()],
    )
    trainer.train()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=96)
    options = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    prepare_environment()
    import torch

    from dist_lm.cluster.local import free_port
    from dist_lm.ranks import Ranks, disconnect

    torch.set_num_threads(1)
    os.environ["MASTER_PORT"] = str(free_port())
    ranks = Ranks.connect()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_text(folder, options.seq_len)
        task, batches = load_batches(folder, options.rows, 8)
        variants = {"bare": bare(task, batches), "bare_again": bare(task, batches)}
        variants["bare_masked"] = bare_masked(task, batches)
        variants |= {f"zero{stage}": ours(task, batches, stage, ranks) for stage in range(4)}
        seconds = measure(variants, task, batches, options.rounds, folder)
    disconnect()
    reference = statistics.median(seconds["bare"])
    print(f"{options.rounds} rounds, {options.rows} rows x {options.seq_len} tokens, 1 process, 1 thread, fp32")
    print(f"{'variant':12} {'min ms':>8} {'median ms':>10} {'median / bare':>14}")
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:12} {min(values) * 1e3:8.1f} {median * 1e3:10.1f} {median / reference:14.3f}")
    ratios = {f"{name}_vs_bare": round(statistics.median(values) / reference, 4) for name, values in seconds.items()}
    ratios.pop("bare_vs_bare")
    ours_alone = {f"zero{stage}": statistics.median(seconds[f"zero{stage}"]) for stage in range(4)}
    masked = statistics.median(seconds["bare_masked"])
    ratios |= {f"{name}_vs_bare_masked": round(value / masked, 4) for name, value in ours_alone.items()}
    print(json.dumps({"aa": ratios.pop("bare_again_vs_bare"), **ratios}))


if __name__ == "__main__":
    main()
