"""Every setting with two possible homes, and what dist_lm chooses where DeepSpeed would be silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_lm import deepspeed_keys as keys
from dist_lm.config_files import identity, load_config
from dist_lm.deepspeed_config import resolve
from dist_lm.deepspeed_json import auto_paths
from tests.deepspeed_text import FULL_OF_AUTOS, YAML, at, load, nested, refusal, resolved

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with x.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("x.yaml").write_text(YAML)
    return tmp_path


# -- "auto"


@pytest.mark.parametrize(("path", "formula"), keys.FORMULAS.items(), ids=map(".".join, keys.FORMULAS))
def test_auto_sizes_follow_from_the_hidden_size(folder: Path, path: keys.KeyPath, formula: keys.Formula) -> None:
    result = resolved({"zero_optimization": {"stage": 3, path[1]: "auto"}})
    expected = {
        "reduce_bucket_size": 16384,
        "allgather_bucket_size": 16384,
        "stage3_prefetch_bucket_size": 14745,
        "stage3_param_persistence_threshold": 1280,
    }
    assert at(result.settings, *path) == expected[path[1]]
    assert any(path[1] in note and formula.words in note and "ds.json:4" in note for note in result.notes)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (("zero_optimization", "overlap_comm"), 3),
        (("zero_optimization", "offload_optimizer", "device"), 4),
        (("aio", "block_size"), 3),
        (("communication_data_type",), 2),
        (("wall_clock_breakdown",), 2),
    ],
)
def test_auto_without_a_meaning_is_refused_with_its_line(folder: Path, path: keys.KeyPath, line: int) -> None:
    message = refusal(nested(path, "auto"))
    assert f'"auto" has no meaning in `{".".join(path)}`   (ds.json:{line})' in message


def test_no_auto_is_left_in_a_file_full_of_them(folder: Path) -> None:
    result = resolved(FULL_OF_AUTOS, "precision=bf16")
    # DeepSpeed itself gives this one a meaning.
    assert list(auto_paths(result.settings)) == [("data_types", "keep_in_fp32_modules")]
    assert "train_batch_size" not in result.settings


# -- two owners


OWNED = [
    (("gradient_clipping",), 0.5, "optim.clip", "1.0", 2),
    (("bf16", "enabled"), True, "precision", "fp32", 3),
    (("zero_optimization", "stage"), 2, "zero", "1", 3),
    (("steps_per_print",), 7, "run.log_every", "10", 2),
    (("optimizer", "params", "weight_decay"), 0.3, "optim.weight_decay", "0.01", 4),
    (("optimizer", "params", "betas"), [0.9, 0.98], "optim.betas", "[0.9, 0.999]", 4),
    (("optimizer", "params", "eps"), 1e-6, "optim.eps", "1e-8", 4),
    (("data_types", "param_dtype"), "bfloat16", "precision", "fp32", 3),
]
ADOPTED = {
    "precision": "bf16",
    "optim.betas": (0.9, 0.98),
}


@pytest.mark.parametrize(("path", "value", "key", "other", "line"), OWNED)
def test_a_value_of_the_json_alone_holds_for_the_whole_run(
    folder: Path, path: keys.KeyPath, value: Any, key: str, other: str, line: int
) -> None:
    loaded = load(nested(path, value))
    result = resolve(loaded.config, world_size=2, micro_rows=16, micro_steps=2, source_of=loaded.origins)
    found: Any = loaded.config
    for part in key.split("."):
        found = getattr(found, part)
    assert found == ADOPTED.get(key, value)
    assert loaded.origins[key] == f"ds.json:{line}"
    assert result.config == loaded.config
    before = identity(load_config(Path("x.yaml")).config)
    if key in before:
        assert identity(loaded.config)[key] != before[key]


@pytest.mark.parametrize(("path", "value", "key", "other", "line"), OWNED)
def test_equal_values_are_fine_and_stay_the_yamls(
    folder: Path, path: keys.KeyPath, value: Any, key: str, other: str, line: int
) -> None:
    override = f"{key}={json.dumps(value)}" if key != "precision" else "precision=bf16"
    assert load(nested(path, value), override).origins[key] == f"override `{override}`"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("train_batch_size",), 64),
        (("train_batch_size",), "64"),
        (("train_micro_batch_size_per_gpu",), 16.0),
        (("gradient_accumulation_steps",), "2"),
        (("optimizer", "params", "lr"), "1e-4"),
        (("optimizer", "type"), "Adam"),
    ],
)
def test_equal_values_may_be_written_differently(folder: Path, path: keys.KeyPath, value: Any) -> None:
    settings = resolved(nested(path, value)).settings
    # DeepSpeed derives the one, and would build the other.
    assert not {"train_batch_size", "optimizer"} & set(settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"gradient_clipping": -1}, "`optim.clip` should be greater than or equal to 0, got -1   (ds.json:2)"),
        ({"gradient_clipping": True}, "`gradient_clipping` should not be true or false   (ds.json:2)"),
        ({"zero_optimization": {"stage": 4}}, "`zero` should be 'auto', 0, 1, 2 or 3, got 4   (ds.json:3)"),
        ({"optimizer": {"type": "Lion"}}, "`optim.name` should be 'adamw', 'nadam' or 'sgd', got 'Lion'   (ds.json:3)"),
    ],
)
def test_a_wrong_value_in_the_json_has_its_line(folder: Path, settings: dict[str, Any], words: str) -> None:
    assert words in refusal(settings)


# -- what DeepSpeed would choose silently


@pytest.mark.parametrize(
    ("precision", "stage", "written", "fine"),
    [
        ("fp32", 0, "bf16", False),
        ("fp32", 2, "bf16", False),
        ("fp32", 2, "fp32", True),
        ("bf16", 0, "fp32", False),
        ("bf16", 0, "bf16", True),
        ("bf16", 1, "fp32", True),
        ("bf16", 2, "bfloat16", True),
        ("bf16", 3, "fp16", False),
    ],
)
def test_gradients_are_summed_in_a_type_that_the_stage_can(
    folder: Path, precision: str, stage: int, written: str, fine: bool
) -> None:
    settings = {"data_types": {"grad_accum_dtype": written}}
    overrides = [f"precision={precision}", f"zero={stage}"]
    if fine:
        result = resolved(settings, *overrides)
        assert result.settings["data_types"]["grad_accum_dtype"] == written
    else:
        message = refusal(settings, *overrides)
        assert f'ds.json:3  "{written}"' in message
        assert f"override `precision={precision}`" in message


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_of_several_micro_steps_are_summed_in_fp32(folder: Path, stage: int) -> None:
    result = resolved({}, "precision=bf16", f"zero={stage}")
    assert result.settings["data_types"] == {"grad_accum_dtype": "fp32"}
    assert result.settings["bf16"] == {"enabled": True}


def test_bf16_at_stage_0_has_no_fp32_sums(folder: Path) -> None:
    assert "data_types" not in resolved({}, "precision=bf16", "zero=0").settings


def test_deepspeed_s_own_clocks_and_lines_are_off_unless_asked_for(folder: Path) -> None:
    settings = resolved({}).settings
    assert settings["timers"] == {"throughput": {"enabled": False}}
    assert settings["wall_clock_breakdown"] is False
    assert settings["steps_per_print"] > 10**6
    asked = resolved({"wall_clock_breakdown": True, "timers": {"throughput": {"enabled": True}}}).settings
    assert asked["timers"] == {"throughput": {"enabled": True}}
    assert asked["wall_clock_breakdown"] is True


def test_resolving_leaves_the_configuration_alone_and_gives_the_same_again(folder: Path) -> None:
    loaded = load({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})
    how: dict[str, Any] = {"world_size": 2, "micro_rows": 16, "micro_steps": 2, "source_of": loaded.origins}
    first = resolve(loaded.config, **how)
    first.settings["zero_optimization"]["offload_optimizer"]["device"] = "none"
    assert resolve(loaded.config, **how).settings["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
