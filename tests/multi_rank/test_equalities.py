"""The equalities that the maths demands: of divisions of a batch, of ZeRO stages, of resumed runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.data.prepare import PrepareOptions, prepare
from dist_lm.metrics import read_metrics
from tests.rank_scenarios import heldout_loss, losses, scenario, train_scenarios

CLOSE = 1e-5
"""Relative: fp32 sums in another order differ by about 1e-6."""
DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}
SAVED_AT = 3

DIVISIONS: dict[int, dict[str, dict[str, Any]]] = {
    1: {
        "zero0": {},
        "accumulate8-zero0": {"batch__micro": 4},
        "zero1": {"zero": 1},
        "accumulate4-zero1": {"zero": 1, "batch__micro": 8},
        "accumulate4-zero2": {"zero": 2, "batch__micro": 8},
        "accumulate4-zero3": {"zero": 3, "batch__micro": 8},
    },
    2: {
        **{f"zero{stage}": {"zero": stage, "batch__micro": 16} for stage in range(4)},
        **{f"accumulate4-zero{stage}": {"zero": stage, "batch__micro": 4} for stage in range(4)},
        "words-zero2": {"zero": 2, "task__mask_unit": "word"},
        "padded-zero3": {"zero": 3, "task__packing": False},
    },
    3: {
        **{f"zero{stage}": {"zero": stage} for stage in range(4)},
        "accumulate3-zero2": {"zero": 2, "batch__micro": 4},
    },
}
OPTIMIZERS: dict[str, tuple[dict[str, Any], dict[int, int]]] = {
    "nadam": ({"optim__name": "nadam", "zero": 2}, {1: 0, 3: 3}),
    "sgd": ({"optim__name": "sgd", "optim__lr": 0.2, "zero": 3}, {1: 1, 3: 2}),
}
"""Optimizers with other states than AdamW's: how two ranks train, and the stages to go on at, by world size."""
STATES = {"nadam": {"weight", "exp_avg", "exp_avg_sq"}, "sgd": {"weight", "momentum_buffer"}}
HAS_FP16 = bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
"""Of this CPU, as DeepSpeed asks it."""
NEEDS_FP16 = pytest.mark.skipif(not HAS_FP16, reason="this CPU does not compute in fp16")
RESUMED = {
    f"zero{stage}-{precision}": {"zero": stage, "precision": precision, "batch__micro": 8, **DROPOUT}
    for stage in range(4)
    for precision in ("fp32", "bf16", "fp16")
    if (stage, precision) != (0, "fp16")
} | {name: {**changes, **DROPOUT} for name, (changes, _) in OPTIMIZERS.items()}


def resumed_copy(run: Path, copy: Path, config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run folder as a crash after SAVED_AT would have left it, and the configuration to go on with."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > SAVED_AT:
            shutil.rmtree(folder)
    batch = {**config["batch"], **changes.pop("batch", {})}
    return {**config, **changes, "batch": batch, "run": {**config["run"], "dir": str(copy)}}


@pytest.fixture(scope="module")
def data(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs for documents: rows are short, so that samples share them."""
    folder = tmp_path_factory.mktemp("paragraphs")
    shutil.copytree(topics_data / "tokenizer", folder / "tokenizer")
    paragraphs = [part for name in sorted(topics)[:40] for part in topics[name].split("\n\n")]
    source = folder / "paragraphs.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    tokenizer = folder / "tokenizer"
    options = {"seq_len": 64, "heldout_fraction": 0.05, "block_rows": 64, "shard_rows": 256, "workers": 1}
    prepare(PrepareOptions(inputs=[str(source)], out=folder / "pairs", tokenizer=tokenizer, **options))
    return folder


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of this module, one process group a world size."""
    root = tmp_path_factory.mktemp("equalities")
    configs: dict[int, list[dict[str, Any]]] = {}
    for world_size, divisions in DIVISIONS.items():
        configs[world_size] = [
            scenario(data, root / f"{world_size}-{name}", **changes) for name, changes in divisions.items()
        ]
    whole = {
        name: scenario(data, root / f"whole-{name}", **changes)
        for name, changes in RESUMED.items()
        if HAS_FP16 or "fp16" not in name
    }
    for name, (changes, _) in OPTIMIZERS.items():
        configs[2].append(scenario(data, root / f"2-{name}", **changes))
    train_scenarios(root, configs[2], num_ranks=2)
    train_scenarios(root, [*whole.values()], num_ranks=2)
    saved = scenario(data, root / "2-zero2", **DIVISIONS[2]["zero2"])
    saved3 = scenario(data, root / "2-zero3", **DIVISIONS[2]["zero3"])
    for world_size in (1, 3):
        for stage in range(4):
            copy = root / f"from2-{world_size}-zero{stage}"
            configs[world_size].append(resumed_copy(root / "2-zero2", copy, saved, zero=stage))
        copy = root / f"from3-{world_size}-zero1"
        configs[world_size].append(resumed_copy(root / "2-zero3", copy, saved3, zero=1))
        for name, (changes, stages) in OPTIMIZERS.items():
            begun = scenario(data, root / f"2-{name}", **changes)
            copy = root / f"{name}-{world_size}"
            configs[world_size].append(resumed_copy(root / f"2-{name}", copy, begun, zero=stages[world_size]))
    train_scenarios(root, configs[1], num_ranks=1)
    train_scenarios(root, configs[3], num_ranks=3)
    again = [resumed_copy(root / f"whole-{name}", root / f"again-{name}", config) for name, config in whole.items()]
    train_scenarios(root, again, num_ranks=2)
    return root


@pytest.mark.parametrize(
    ("world_size", "name"),
    [(world_size, name) for world_size, divisions in DIVISIONS.items() for name in divisions if "words" not in name],
)
def test_losses_do_not_depend_on_how_the_batch_is_divided(runs: Path, world_size: int, name: str) -> None:
    reference = losses(runs / "1-zero0")
    divided = losses(runs / f"{world_size}-{name}")
    assert sorted(divided) == list(range(1, 7))
    assert [divided[step] for step in divided] == pytest.approx(list(reference.values()), rel=CLOSE)
    assert heldout_loss(runs / f"{world_size}-{name}") == pytest.approx(heldout_loss(runs / "1-zero0"), rel=CLOSE)


def test_samples_share_rows_so_that_little_is_padding(runs: Path) -> None:
    packed, padded = (
        sum(record["padding_share"] for record in read_metrics(runs / name / "metrics.jsonl", "train"))
        for name in ("2-zero3", "2-padded-zero3")
    )
    assert packed < 0.6 * padded


def test_the_model_learns_so_that_the_equalities_say_something(runs: Path) -> None:
    reference = losses(runs / "1-zero0")
    assert reference[6] < reference[1] - 0.05


def test_masking_whole_words_changes_the_targets(runs: Path) -> None:
    assert losses(runs / "2-words-zero2")[1] != losses(runs / "2-zero2")[1]


@pytest.mark.parametrize("name", [pytest.param(name, marks=NEEDS_FP16 if "fp16" in name else ()) for name in RESUMED])
def test_resumed_losses_equal_the_uninterrupted_ones_to_the_last_bit(runs: Path, name: str) -> None:
    again, whole = losses(runs / f"again-{name}"), losses(runs / f"whole-{name}")
    assert again == whole
    assert heldout_loss(runs / f"again-{name}") == heldout_loss(runs / f"whole-{name}")
    # It did resume: two attempts, and the second one began at the checkpoint.
    assert len(list((runs / f"again-{name}" / "attempts").glob("*.json"))) == 2


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", [*(f"from2-{{}}-zero{stage}" for stage in range(4)), "from3-{}-zero1"])
def test_a_checkpoint_goes_on_at_another_world_size_and_stage(runs: Path, world_size: int, name: str) -> None:
    reference, resumed = losses(runs / "1-zero0"), losses(runs / name.format(world_size))
    assert list(resumed.values()) == pytest.approx(list(reference.values()), rel=CLOSE)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_of_any_optimizer_goes_on_at_another_world_size_and_stage(
    runs: Path, world_size: int, name: str
) -> None:
    whole, resumed = losses(runs / f"2-{name}"), losses(runs / f"{name}-{world_size}")
    assert [*resumed.values()] == pytest.approx([*whole.values()], rel=CLOSE)
    # Another optimizer than AdamW did it, with a state of its own.
    assert [*whole.values()] != pytest.approx([*losses(runs / "2-zero2").values()], rel=1e-4)
    keys = Checkpoint.load(runs / f"2-{name}" / "checkpoints" / "step-00000006").parameters
    assert {key for facts in keys.values() for key in facts["keys"]} == STATES[name]
