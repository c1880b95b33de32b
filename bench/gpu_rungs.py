"""The rungs of bench/gpu.py: one change each, from HF Trainer as it comes to dist_lm.

Enters: a shape, a number of rows, a rung.  Leaves: what its steps took.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import transformers as hf

from bench.gpu_models import Shape, batch, build
from dist_lm.config import OptimSection
from dist_lm.engine import Engine
from dist_lm.ranks import Ranks
from dist_lm.tasks.base import MicroBatch
from dist_lm.tasks.heads import ENCODER_HEADS, find_decoder_head, find_head, loss_sums_in_chunks

BATCHES = 8
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LR, CLIP, DECAY = 1e-4, 1.0, 0.01


@dataclass(frozen=True)
class Rung:
    """One way to train."""

    name: str
    trainer: bool = False
    bf16: bool = True
    padded: bool = False
    head: bool = False
    """Logits of targets only, in chunks."""
    compiled: bool = False


LADDER = (
    Rung("HF Trainer, as it comes (fp32, padded)", trainer=True, bf16=False, padded=True),
    Rung("+ bf16", trainer=True, padded=True),
    Rung("+ packed, without a mask", trainer=True),
    Rung("dist_lm's loop, same head"),
    Rung("+ head of targets, in chunks", head=True),
    Rung("+ torch.compile", head=True, compiled=True),
)


@dataclass(frozen=True)
class Timing:
    """Of one step."""

    step_s: float
    host_s: float
    """Until the host has given out all its work."""
    tokens: float
    memory_gib: float
    syncs: int
    """Times that the host waited for the device."""


class Clock:
    """Moments on the device, read at the end; on a CPU the host's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.moments: list[Any] = []
        self.host: list[float] = []
        self._began = 0.0

    def begin(self) -> None:
        self._began = time.perf_counter()
        if not self.moments:
            self._mark()

    def end(self) -> None:
        self.host.append(time.perf_counter() - self._began)
        self._mark()

    def steps(self, warm_up: int) -> tuple[float, float]:
        """Medians of device and host, seconds."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            taken = [a.elapsed_time(b) / 1e3 for a, b in zip(self.moments, self.moments[1:], strict=False)]
        else:
            taken = [b - a for a, b in zip(self.moments, self.moments[1:], strict=False)]
        return median(taken[warm_up:]), median(self.host[warm_up:])

    def _mark(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.moments.append(event)
        else:
            self.moments.append(time.perf_counter())


def measure(rung: Rung, shape: Shape, rows: int, ranks: Ranks, *, steps: int, warm_up: int) -> Timing:
    """Raises torch.OutOfMemoryError."""
    device = ranks.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    batches = [batch(shape, rows, padded=rung.padded, seed=number) for number in range(BATCHES)]
    clock = Clock(device)
    run = _trainer if rung.trainer else _ours
    syncs = run(rung, shape, [each for each, _ in batches], ranks, clock, steps + warm_up)
    step_s, host_s = clock.steps(warm_up)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return Timing(step_s, host_s, sum(tokens for _, tokens in batches) / BATCHES, memory, syncs)


def _count_syncs(device: torch.device, step: Callable[[], object]) -> int:
    if device.type != "cuda":
        step()
        return 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in caught)


@contextlib.contextmanager
def _no_rank() -> Iterator[None]:
    """Trainer wraps the model in DDP where it finds these variables; who has one GPU does not set them."""
    taken = {name: os.environ.pop(name) for name in RANK_VARIABLES if name in os.environ}
    try:
        yield
    finally:
        os.environ |= taken


def _trainer(rung: Rung, shape: Shape, batches: list[Any], ranks: Ranks, clock: Clock, steps: int) -> int:
    class Timer(hf.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            clock.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.end()

    class Batches(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return steps

        def __getitem__(self, number: int) -> Any:
            return batches[number % len(batches)]

    with tempfile.TemporaryDirectory() as folder, _no_rank():
        arguments = hf.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=1,
            max_steps=steps,
            learning_rate=LR,
            weight_decay=DECAY,
            max_grad_norm=CLIP,
            bf16=rung.bf16,
            use_cpu=ranks.device.type == "cpu",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = hf.Trainer(
            build(shape),
            arguments,
            train_dataset=Batches(),
            data_collator=lambda items: items[0],
            callbacks=[Timer()],
        )
        trainer.train()
    # Trainer's loop is not ours to step: its waits are not counted.
    return -1


class _Loss:
    """What Engine asks of a task: sums of a loss."""

    def __init__(self, model: Any, *, masked: bool, head: bool, chunk: int) -> None:
        self._head, self._chunk = None, chunk
        if head and masked:
            ids = torch.arange(8)[None]
            self._head = find_head(
                model, ENCODER_HEADS, lambda: model.base_model(ids).last_hidden_state, lambda: model(ids).logits
            )
        elif head:
            self._head = find_decoder_head(model)

    def loss_sums(self, model: Any, inputs: Any) -> dict[str, torch.Tensor]:
        if self._head is None:
            loss = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).loss
            return {"lm_loss": loss * inputs["count"]}
        head = self._head
        found = model.base_model(input_ids=inputs["input_ids"]).last_hidden_state.flatten(0, 1)[inputs["places"]]
        return loss_sums_in_chunks(
            "lm", lambda part: head(model, part), found, inputs["place_labels"], chunk=self._chunk
        )


def _micro_batch(inputs: dict[str, torch.Tensor], *, masked: bool) -> MicroBatch:
    """With targets by place, as dist_lm's tasks make them: their number is known on the host."""
    labels = inputs["labels"] if masked else torch.nn.functional.pad(inputs["labels"][:, 1:], (0, 1), value=-100)
    places = (labels.flatten() != -100).nonzero()[:, 0]
    more = {"places": places, "place_labels": labels.flatten()[places], "count": torch.tensor(float(len(places)))}
    slots = inputs["input_ids"].numel()
    return MicroBatch({**inputs, **more}, {"lm": len(places)}, slots, slots)


def _ours(rung: Rung, shape: Shape, batches: list[Any], ranks: Ranks, clock: Clock, steps: int) -> int:
    model = build(shape)
    task: Any = _Loss(model, masked=shape.masked, head=rung.head, chunk=4096)
    if rung.compiled:
        model.compile()
        model.base_model.compile()
    settings = {
        "train_micro_batch_size_per_gpu": len(batches[0]["input_ids"]),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
    }
    optim = OptimSection(lr=LR, clip=CLIP, weight_decay=DECAY)
    engine = Engine(model, task, optim=optim, deepspeed_settings=settings, ranks=ranks, seed=1)
    micro_batches = [_micro_batch(each, masked=shape.masked) for each in batches]
    if ranks.device.type == "cuda":
        micro_batches = [
            MicroBatch({n: v.pin_memory() for n, v in each.inputs.items()}, each.targets, each.tokens, each.slots)
            for each in micro_batches
        ]

    def step(number: int) -> None:
        each = micro_batches[number % len(micro_batches)]
        engine.step([each], global_targets={"lm": float(each.targets["lm"])}, learning_rate=LR, position=number)

    for number in range(steps):
        clock.begin()
        step(number)
        clock.end()
    syncs = _count_syncs(ranks.device, lambda: step(steps))
    engine.close()
    return syncs
