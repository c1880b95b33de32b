"""Hugging Face's Trainer as a variant of bench/step.py; it leads, and the others run between its steps.

Enters: a scene, and what to do after each of its steps.  Leaves: wall and CPU seconds of each step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_variants import CLIP, DECAY, LR, Scene, dense_inputs
from transformers import Trainer, TrainerCallback, TrainingArguments

Seconds = tuple[float, float]
"""Wall and process CPU time."""


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(began: Seconds) -> Seconds:
    wall, cpu = now()
    return wall - began[0], cpu - began[1]


class _Turns(TrainerCallback):  # type: ignore[misc]
    def __init__(self, before: Callable[[], None], after: Callable[[int, Seconds], None]) -> None:
        self.before, self.after = before, after
        self.number = 0
        self.began: Seconds = (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.before()
        self.began = now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        taken = since(self.began)
        self.after(self.number, taken)
        self.number += 1


class _Batches(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __init__(self, scene: Scene, length: int) -> None:
        self.dense = [dense_inputs(scene.task, part) for step in scene.steps for part in step.micro_batches]
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, number: int) -> Any:
        return self.dense[number % len(self.dense)]


def lead(
    scene: Scene,
    folder: Path,
    *,
    rounds: int,
    deepspeed: bool,
    before: Callable[[], None],
    after: Callable[[int, Seconds], None],
) -> None:
    """Train `rounds` steps; `deepspeed`: with ZeRO-2 as its documentation shows it, everything "auto"."""
    zero2 = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    arguments = TrainingArguments(
        output_dir=str(folder / f"hf-{scene.ranks.rank}"),
        # A "row" of the data set is a whole micro-batch, collated beforehand.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=scene.accumulation,
        max_steps=rounds,
        learning_rate=LR,
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        use_cpu=True,
        ddp_find_unused_parameters=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        deepspeed=zero2 if deepspeed else None,
    )
    trainer = Trainer(
        model=scene.new_model(),
        args=arguments,
        train_dataset=_Batches(scene, rounds * scene.accumulation * scene.ranks.world_size),
        data_collator=lambda items: items[0],
        callbacks=[_Turns(before, after)],
    )
    trainer.train()
