"""An exported folder is an ordinary Hugging Face model, from every ZeRO stage."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForPreTraining, AutoTokenizer, BertForPreTraining, pipeline

from dist_lm.checkpoint.commit import published
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.reader import Reader
from dist_lm.errors import ConfigError, DataError
from dist_lm.export import Exported, export
from dist_lm.faults import OF_EXPORT, VARIABLE
from tests.rank_scenarios import scenario, train_scenarios


@pytest.fixture(scope="module")
def runs(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    configs = [
        scenario(topics_data, root / f"{precision}-{stage}", zero=stage, precision=precision, batch__micro=16)
        for precision, stage in [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 2)]
    ]
    train_scenarios(root, configs, num_ranks=2)
    return root


@pytest.mark.parametrize("name", ["fp32-0", "fp32-1", "fp32-2", "fp32-3", "bf16-2"])
def test_an_export_has_the_names_and_weights_of_a_fresh_model(runs: Path, name: str, tmp_path: Path) -> None:
    done = export(str(runs / name), tmp_path / "model")
    assert done.step == 6
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path / "model", local_files_only=True)
    assert type(loaded) is BertForPreTraining
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as content:
        written = set(content.keys())
    assert not [key for key in written if key.endswith(("gamma", "beta"))]
    reader = Reader(Checkpoint.load(published(runs / name / "checkpoints")[0]))
    for key, parameter in loaded.named_parameters():
        assert torch.equal(parameter, reader.weight(key)), key
    # Names as in a model that never saw a checkpoint, but for those that are tied to another one.
    assert written <= set(BertForPreTraining(loaded.config).state_dict())
    assert {key for key, _ in loaded.named_parameters()} <= written


def test_plain_transformers_predicts_with_it(runs: Path, tmp_path: Path) -> None:
    export(str(runs / "fp32-2"), tmp_path / "model")
    guesses = pipeline("fill-mask", model=str(tmp_path / "model"))("the [MASK] statement is executed.")
    assert len(guesses) == 5
    pair = AutoTokenizer.from_pretrained(tmp_path / "model")("one sentence", "another one")
    assert 1 in pair["token_type_ids"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "6 steps" in card
    assert "mlm_loss" in card


def test_an_earlier_step_can_be_named(runs: Path, tmp_path: Path) -> None:
    assert export(f"{runs / 'fp32-1'}@3", tmp_path / "model").step == 3
    with pytest.raises(ConfigError, match="no checkpoint of step 4"):
        export(f"{runs / 'fp32-1'}@4", tmp_path / "none")


def test_nothing_is_overwritten_and_damage_is_named(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious.txt").write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        export(str(runs / "fp32-1"), tmp_path / "there")
    with pytest.raises(ConfigError, match="not a run folder"):
        export(str(tmp_path / "there"), tmp_path / "model")
    shutil.copytree(runs / "fp32-1", tmp_path / "copy")
    file = published(tmp_path / "copy" / "checkpoints")[0] / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"rank-00000\.safetensors has"):
        export(str(tmp_path / "copy"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def with_a_fault(exports: Callable[[str, Path], Exported], run: str, out: Path, fault: str) -> None:
    os.environ[VARIABLE] = fault
    exports(run, out)


def check_killed_exports(exports: Callable[[str, Path], Exported], run: Path, step: int, folder: Path) -> None:
    """Kill an export at each of its crash points; nothing is there, and the next one is whole."""
    folder.mkdir()
    multiprocessing.set_forkserver_preload(["dist_lm.export"])
    context = multiprocessing.get_context("forkserver")
    for point in OF_EXPORT:
        given = (exports, str(run), folder / "model", f"kill@rank0:step{step}:{point}")
        process = context.Process(target=with_a_fault, args=given)
        process.start()
        process.join()
        # The fault did fire.
        assert process.exitcode == -signal.SIGKILL
        assert [path.name for path in folder.iterdir()] == [".tmp-model"]
    assert exports(str(run), folder / "model").step == step
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_an_export_that_is_killed_leaves_nothing_under_its_name(runs: Path, tmp_path: Path) -> None:
    check_killed_exports(export, runs / "fp32-1", 6, tmp_path / "exports")
