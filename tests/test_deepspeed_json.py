"""What a DeepSpeed file of dist_lm may not say."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm import deepspeed_keys as keys
from dist_lm.deepspeed_json import NVME_PLACEHOLDER
from dist_lm.json_tree import read_json_tree
from tests.deepspeed_text import YAML, nested, refusal, resolved

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with x.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(YAML)
    return tmp_path


# -- keys that nobody may set, and keys that nobody knows


@pytest.mark.parametrize("path", sorted(keys.REFUSED_IF_ON))
def test_a_switch_that_breaks_a_promise_may_only_be_off(folder: Path, path: keys.KeyPath) -> None:
    message = refusal(nested(path, True))
    assert f"`{'.'.join(path)}` must be off   (ds.json:3)" in message
    assert keys.REFUSED_IF_ON[path] in message
    resolved(nested(path, False))


def test_the_gradient_norm_stays_on(folder: Path) -> None:
    message = refusal({"zero_optimization": {"stage": 2, "compute_grad_norm": False}})
    assert "`zero_optimization.compute_grad_norm` must be on   (ds.json:4)" in message


@pytest.mark.parametrize(
    ("path", "meant", "line"),
    [
        (("gradient_cliping",), "gradient_clipping", 2),
        (("zero_optimisation",), "zero_optimization", 2),
        (("aio", "blok_size"), "block_size", 3),
        (("data_types", "grad_acum_dtype"), "grad_accum_dtype", 3),
        (("optimizer", "parms"), "params", 3),
        (("optimizer", "params", "weight_decai"), "weight_decay", 4),
    ],
)
def test_a_key_that_deepspeed_would_ignore_is_refused(folder: Path, path: keys.KeyPath, meant: str, line: int) -> None:
    message = refusal(nested(path, 1.0))
    assert f"unknown DeepSpeed key `{'.'.join(path)}`   (ds.json:{line})" in message
    assert f"did you mean `{meant}`?" in message


@pytest.mark.parametrize("path", sorted(keys.OBJECTS))
def test_a_block_that_is_no_object_is_refused(folder: Path, path: keys.KeyPath) -> None:
    assert f"`{'.'.join(path)}` should be an object" in refusal(nested(path, [1]))


def test_several_mistakes_in_the_json_are_told_at_once(folder: Path) -> None:
    message = refusal({"gradient_cliping": 1, "scheduler": {}, "train_batch_size": 8})
    assert "3 mistakes   (ds.json)" in message
    # On a shared line, places and values are one space apart.
    for words in ("`gradient_cliping`", "`scheduler`", "ds.json:4 8", "x.yaml:4 64"):
        assert words in message


def test_lines_are_right_after_lists_and_braces_inside_text(folder: Path) -> None:
    text = '{"a": [{"x": 1}, {"x": 2}, {"x": 3}], "b{": "}:\\"{",\n"c": {"d": [],\n\n"e": {"f": 1}}}'
    Path("lines.json").write_text(text)
    tree = read_json_tree(Path("lines.json"))
    places = [tree["a"], tree["b{"], tree["c"], tree["c"].value["d"], tree["c"].value["e"].value["f"]]
    assert [entry.place.rpartition(":")[2] for entry in places] == ["1", "1", "2", "2", "4"]


@pytest.mark.parametrize(
    ("block", "device", "stage", "lowest"),
    [
        ("offload_optimizer", "cpu", 0, 1),
        ("offload_param", "cpu", 2, 3),
        ("offload_optimizer", "nvme", 2, 3),
    ],
)
def test_offload_below_its_stage_is_refused(folder: Path, block: str, device: str, stage: int, lowest: int) -> None:
    offload = {"device": device, "nvme_path": "/disk"}
    message = refusal({"zero_optimization": {"stage": stage, block: offload}})
    assert f"`{block}` to {device} needs ZeRO stage {lowest} or more, the stage is {stage}   (ds.json:4)" in message
    resolved({"zero_optimization": {"stage": lowest, block: offload}})


@pytest.mark.parametrize("path", [None, "", NVME_PLACEHOLDER])
def test_offload_to_disk_needs_a_folder_that_the_user_named(folder: Path, path: str | None) -> None:
    offload = {"device": "nvme"} if path is None else {"device": "nvme", "nvme_path": path}
    message = refusal({"zero_optimization": {"stage": 3, "offload_optimizer": offload}})
    assert "`offload_optimizer.nvme_path` names no folder" in message
    assert f"ds.json:{4 if path is None else 6}" in message
