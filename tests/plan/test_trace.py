"""The trace without numbers: its bytes are those that the allocator gives out, its FLOPs those of the matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch.profiler import ProfilerActivity, profile

from dist_lm.config import CausalLmTask, MlmTask, ModelSection, SourceSpec
from dist_lm.data.stream import Stream
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.data.training_set import TrainingSet
from dist_lm.mesh import Mesh
from dist_lm.plan.trace import MicroStep, introduce, trace
from dist_lm.sequence_parallel import part_of
from dist_lm.tasks.base import MicroBatch, Task, TaskModule
from dist_lm.tasks.registry import build_task
from tests.token_rows import token_rows, token_view, train_kind

ROWS = 8


def micro_batch_of(data: Path, settings: MlmTask | CausalLmTask) -> tuple[Task, MicroBatch]:
    training = TrainingSet([SourceSpec(path=str(data / "pairs" / "train"))], seed=1, lanes=1, era=64)
    task = build_task(settings, load_tokenizer(data / "tokenizer"), training.view, 1)
    with Stream(training, global_rows=ROWS, rank=0, world_size=1, partner_columns=task.partner_columns) as stream:
        return task, task.collate(task.by_length(next(stream).rows))


def allocated_at_most(module: TaskModule, micro_batch: MicroBatch) -> int:
    """Bytes that torch's allocator gave out and had not got back, at the peak of a real step."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        sums = module(**micro_batch.inputs)
        loss = sum(value for name, value in sums.items() if name.endswith("_loss"))
        del sums
        loss.backward()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def step_of(task: Task, section: ModelSection, micro_batch: MicroBatch, precision: str = "fp32") -> MicroStep:
    return trace(task, introduce(task, section), micro_batch, precision=precision, on_gpu=False)


@pytest.mark.parametrize("recomputed", [False, True])
def test_the_peak_is_that_of_a_real_step(topics_data: Path, recomputed: bool) -> None:
    section = ModelSection(size="tiny", activation_checkpointing=recomputed)
    task, micro_batch = micro_batch_of(topics_data, MlmTask(name="mlm"))
    planned = step_of(task, section, micro_batch)
    module = TaskModule(task.build_model(section), task).train()
    assert planned.peak_with_gradients == pytest.approx(allocated_at_most(module, micro_batch), rel=0.01)
    assert planned.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert planned.frozen == 0


def test_rows_that_one_document_fills_are_traced_without_a_mask(tmp_path: Path) -> None:
    tokenizer = train_kind(tmp_path, "bpe")
    task = build_task(CausalLmTask(name="causal_lm", documents="joined"), tokenizer, token_view(tokenizer, 512), 1)
    micro_batch = task.collate(token_rows(tokenizer, 512))
    section = ModelSection(family="llama", size="tiny")
    planned = step_of(task, section, micro_batch)
    module = TaskModule(task.build_model(section), task).train()
    assert planned.peak_with_gradients == pytest.approx(allocated_at_most(module, micro_batch), rel=0.01)


def test_recomputing_trades_memory_for_work(topics_data: Path) -> None:
    task, micro_batch = micro_batch_of(topics_data, MlmTask(name="mlm"))
    plain = step_of(task, ModelSection(size="mini"), micro_batch)
    recomputed = step_of(task, ModelSection(size="mini", activation_checkpointing=True), micro_batch)
    assert recomputed.activation_bytes < plain.activation_bytes / 2
    assert plain.flops < recomputed.flops <= plain.flops * 4 / 3


def test_flops_are_those_of_the_matrices_of_the_layers_and_of_the_head(topics_data: Path) -> None:
    task, micro_batch = micro_batch_of(topics_data, MlmTask(name="mlm"))
    one, three = (
        step_of(task, ModelSection(size="tiny", overrides={"num_hidden_layers": layers}), micro_batch)
        for layers in (1, 3)
    )
    rows, length = micro_batch.inputs["input_ids"].shape
    hidden = 128
    # Four projections and two of width 4 H, two products of attention; forward, and twice that backward.
    a_layer = 2 * rows * length * (4 * hidden**2 + 2 * 4 * hidden**2) + 2 * 2 * rows * length**2 * hidden
    assert three.flops - one.flops == 2 * 3 * a_layer


def test_half_the_width_halves_the_weights_and_less_than_all_of_the_rest(topics_data: Path) -> None:
    task, micro_batch = micro_batch_of(topics_data, MlmTask(name="mlm"))
    whole, half = (step_of(task, ModelSection(size="tiny"), micro_batch, precision) for precision in ("fp32", "bf16"))
    assert whole.parameters == half.parameters
    assert whole.activation_bytes / 2 < half.activation_bytes < whole.activation_bytes


def test_a_model_too_large_for_this_machine_is_traced(topics_data: Path) -> None:
    task, micro_batch = micro_batch_of(topics_data, MlmTask(name="mlm"))
    shape = {"num_hidden_layers": 4, "hidden_size": 8192, "intermediate_size": 32768, "num_attention_heads": 64}
    assert step_of(task, ModelSection(size="tiny", overrides=shape), micro_batch).parameters > 2.5e9


def test_ranks_that_share_rows_share_work_and_memory(tmp_path: Path) -> None:
    tokenizer = train_kind(tmp_path, "bpe")
    task = build_task(CausalLmTask(name="causal_lm"), tokenizer, token_view(tokenizer, 64), 1)
    whole = task.collate(token_rows(tokenizer, 64))
    section = introduce(task, ModelSection(family="llama", size="tiny"))
    alone = trace(task, section, whole, precision="fp32", on_gpu=False)
    parts = [part_of(whole, Mesh(part=part, parts=2)) for part in range(2)]
    steps = [trace(task, section, part, precision="fp32", on_gpu=False, parts=2) for part in parts]
    assert sum(step.flops for step in steps) == alone.flops
    assert all(step.parameters == alone.parameters for step in steps)
    assert all(step.activation_bytes < 0.75 * alone.activation_bytes for step in steps)
    # Queries, keys, values and the result, of which half stays: 2 layers x 4 x 128 / 2.
    assert {(step.exchanged, step.exchanges) for step in steps} == {(512, 8)}
