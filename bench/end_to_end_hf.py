"""Hugging Face's side of bench/end_to_end.py: Trainer with DDP on CPU ranks, started by torchrun.

Enters: a model folder, a prepared data set, settings as JSON.  Leaves: a line of JSON an evaluation.
Rows come from the same data set, windows of full length: nothing is padded.  The held-out loss is
computed by dist_lm's own task, on the same masked rows.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import transformers as hf

from dist_lm.config import MlmTask
from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.manifest import Manifest
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.data.views import view_of
from dist_lm.tasks.base import TaskModule
from dist_lm.tasks.mlm import MaskedLanguageModelling

RANK, WORLD_SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def task_of(settings: dict[str, Any], split: str, **masking: float) -> MaskedLanguageModelling:
    view = view_of(Manifest.load(Path(settings["data"]) / split), settings["seq_len"])
    tokenizer = load_tokenizer(Path(settings["tokenizer"]))
    return MaskedLanguageModelling(MlmTask(name="mlm", pair="none", **masking), tokenizer, view, settings["seed"])


def training_rows(settings: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Every window of the training data, before it is masked."""
    unmasked = task_of(settings, "train", mask_share=0.0, random_share=0.0)
    folder = Path(settings["data"]) / "train"
    batches = HeldoutRows(folder, rank=0, world_size=1, micro_rows=64, seq_len=settings["seq_len"])
    return [{"input_ids": ids} for rows in batches for ids in unmasked.collate(rows).inputs["input_ids"]]


class Evaluation(hf.TrainerCallback):  # type: ignore[misc]
    """The held-out loss every so many steps, written with the clock's time."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.task = task_of(settings, "heldout")

    def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.settings["eval_every"]:
            return
        plain = model.module if hasattr(model, "module") else model
        loss = self.heldout_loss(plain)
        if RANK == 0:
            with Path(self.settings["out"]).open("a") as file:
                file.write(json.dumps({"step": state.global_step, "time": time.time(), "mlm_loss": loss}) + "\n")

    @torch.no_grad()
    def heldout_loss(self, model: Any) -> float:
        rows = HeldoutRows(
            Path(self.settings["data"]) / "heldout",
            rank=RANK,
            world_size=WORLD_SIZE,
            micro_rows=self.settings["micro_rows"],
            seq_len=self.settings["seq_len"],
            seed=self.settings["seed"],
        )
        self.task.prepare_for(model.eval())
        module = TaskModule(model, self.task)
        sums = torch.zeros(2, dtype=torch.float64)
        for part in rows:
            batch = self.task.collate(part)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.settings["precision"] == "bf16"):
                found = module(**batch.inputs)
            sums += torch.tensor([float(found["mlm_loss"]), float(batch.targets["mlm"])], dtype=torch.float64)
        dist.all_reduce(sums)
        model.train()
        return float(sums[0] / sums[1])


def main() -> None:
    settings = json.loads(sys.argv[1])
    tokenizer = hf.AutoTokenizer.from_pretrained(settings["tokenizer"])
    model = hf.AutoModelForMaskedLM.from_pretrained(settings["model"], dtype=torch.float32)
    arguments = hf.TrainingArguments(
        output_dir=f"{settings['out']}.trainer",
        per_device_train_batch_size=settings["micro_rows"],
        max_steps=settings["steps"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=settings["warmup_steps"],
        weight_decay=0.01,
        max_grad_norm=1.0,
        seed=settings["seed"],
        data_seed=settings["seed"],
        bf16=settings["precision"] == "bf16",
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        logging_nan_inf_filter=False,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = hf.Trainer(
        model,
        arguments,
        train_dataset=training_rows(settings),
        data_collator=hf.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
        callbacks=[Evaluation(settings)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
