"""A DeepSpeed JSON beside a YAML: one owner for each setting, and no "auto" left for DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_lm.config import RunConfig
from dist_lm.config_files import LoadedConfig
from dist_lm.deepspeed_config import DEFAULT_STAGE, ResolvedDeepSpeed, load_run, resolve
from dist_lm.deepspeed_json import auto_paths
from dist_lm.deepspeed_keys import AUTO_IN_DEEPSPEED, REFUSED
from dist_lm.errors import ConfigError
from dist_lm.schedule import BatchPlan
from tests.recipe_text import line_of, write_deepspeed, write_recipe

pytestmark = pytest.mark.fast

SHIPPED = sorted((Path(__file__).parent.parent / "ds_configs").glob("*.json"))
HIDDEN = 128


def load(folder: Path, values: dict[str, Any], *overrides: str) -> LoadedConfig:
    """The recipe with this DeepSpeed JSON."""
    path = write_deepspeed(folder, values)
    return load_run(write_recipe(folder), [f"deepspeed={path}", *overrides])


def settled(loaded: LoadedConfig, *, world_size: int = 2, hidden_size: int | None = HIDDEN) -> ResolvedDeepSpeed:
    batch = loaded.config.batch
    plan = BatchPlan.divide(batch.global_rows, batch.micro_rows, world_size)
    return resolve(
        loaded.config,
        world_size=world_size,
        micro_rows=plan.rows_per_micro,
        micro_steps=plan.micro_steps,
        hidden_size=hidden_size,
        source_of=loaded.origins,
    )


def settings(folder: Path, values: dict[str, Any], *overrides: str) -> dict[str, Any]:
    return settled(load(folder, values, *overrides)).settings


def at(values: dict[str, Any], dotted: str) -> Any:
    found: Any = values
    for part in dotted.split("."):
        found = found[part]
    return found


def nested(dotted: str, value: Any) -> dict[str, Any]:
    for part in reversed(dotted.split(".")):
        value = {part: value}
    return dict(value)


def refusal(folder: Path, values: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        settings(folder, values, *overrides)
    return str(caught.value)


# What DeepSpeed 0.19 does by itself stands in the id: most of it is silent.
@pytest.mark.parametrize(
    ("written", "override", "key", "expected"),
    [
        pytest.param("bf16.enabled", "precision=bf16", "bf16.enabled", True, id="bf16 auto trains fp32"),
        pytest.param("bf16.enabled", "precision=fp32", "bf16.enabled", False, id="bf16 auto, fp32 wanted"),
        pytest.param("zero_optimization.stage", "zero=3", "zero_optimization.stage", 3, id="stage auto is 0"),
        pytest.param("gradient_clipping", "optim.clip=0.5", "gradient_clipping", 0.5, id="clipping auto dies late"),
        pytest.param("steps_per_print", "optim.clip=0.0", "gradient_clipping", 0.0, id="absent clipping is 1"),
        pytest.param(
            "train_micro_batch_size_per_gpu",
            "batch.micro=4",
            "train_micro_batch_size_per_gpu",
            4,
            id="micro auto is a TypeError",
        ),
        pytest.param(
            "gradient_accumulation_steps", "batch.micro=4", "gradient_accumulation_steps", 8, id="accumulation auto"
        ),
    ],
)
def test_auto_becomes_what_the_yaml_says(tmp_path: Path, written: str, override: str, key: str, expected: Any) -> None:
    assert at(settings(tmp_path, nested(written, "auto"), override), key) == expected


def test_an_auto_optimizer_leaves_nothing_for_deepspeed_to_read(tmp_path: Path) -> None:
    block = {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
    assert "optimizer" not in settings(tmp_path, {"optimizer": block, "train_batch_size": "auto"})


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("gradient_cliping", "gradient_clipping"),
        ("zero_optimisation", "zero_optimization"),
        ("aio.block_sise", "block_size"),
        ("data_types.grad_acum_dtype", "grad_accum_dtype"),
    ],
)
def test_a_typo_that_deepspeed_ignores_is_refused_with_its_line(tmp_path: Path, typo: str, meant: str) -> None:
    message = refusal(tmp_path, {"wall_clock_breakdown": False} | nested(typo, 1))
    last = typo.rpartition(".")[2]
    assert f"unknown DeepSpeed key `{typo}`" in message
    assert line_of(tmp_path / "deepspeed.json", last) in message
    assert f"did you mean `{meant}`?" in message


def test_sizes_that_do_not_multiply_are_refused_with_the_right_count(tmp_path: Path) -> None:
    message = refusal(tmp_path, {"gradient_accumulation_steps": 3})
    assert "`gradient_accumulation_steps` does not follow from the batch" in message
    assert f"{tmp_path}/deepspeed.json:2  3" in message
    assert f"{line_of(tmp_path / 'recipe.yaml', 'batch:')}  64 rows (batch.global) on 2 ranks" in message
    assert "make 4 micro-steps of 8 rows" in message


# The owner of a setting, its home in the JSON, what the recipe says, and another value.
OWNED = [
    ("train_batch_size", "batch.global", 64, 128),
    ("train_micro_batch_size_per_gpu", "batch.micro", 8, 4),
    ("optimizer.params.lr", "optim.lr", 1e-4, 2e-4),
]


@pytest.mark.parametrize(("path", "key", "equal", "other"), OWNED)
def test_an_equal_value_passes_and_another_one_names_both_places(
    tmp_path: Path, path: str, key: str, equal: Any, other: Any
) -> None:
    settings(tmp_path, nested(path, equal))
    settings(tmp_path, nested(path, str(equal)))
    message = refusal(tmp_path, nested(path, other))
    assert f"`{path}` is set twice" in message
    assert line_of(tmp_path / "deepspeed.json", path.rpartition(".")[2]) in message
    assert line_of(tmp_path / "recipe.yaml", "lr:" if key == "optim.lr" else "batch:") in message


@pytest.mark.parametrize(
    ("path", "value", "override"),
    [
        ("gradient_clipping", 2.0, "optim.clip=1.0"),
        ("zero_optimization.stage", 2, "zero=3"),
        ("bf16.enabled", True, "precision=fp32"),
        ("data_types.param_dtype", "bf16", "precision=fp32"),
        ("optimizer.params.betas", [0.9, 0.95], "optim.betas=[0.9, 0.999]"),
        ("optimizer.params.weight_decay", 0.1, "optim.weight_decay=0.01"),
        ("steps_per_print", 5, "run.log_every=10"),
    ],
)
def test_a_value_that_contradicts_an_override_names_file_line_and_override(
    tmp_path: Path, path: str, value: Any, override: str
) -> None:
    message = refusal(tmp_path, nested(path, value), override)
    assert f"`{path}` is set twice" in message
    assert line_of(tmp_path / "deepspeed.json", path.rpartition(".")[2]) in message
    assert f"override `{override}`" in message


@pytest.mark.parametrize(
    ("path", "value", "key", "adopted"),
    [
        ("gradient_clipping", 2.0, "optim.clip", 2.0),
        ("zero_optimization.stage", 3, "zero", 3),
        ("bf16.enabled", True, "precision", "bf16"),
        ("optimizer.params.betas", [0.9, 0.95], "optim.betas", (0.9, 0.95)),
        ("optimizer.params.weight_decay", 0.1, "optim.weight_decay", 0.1),
    ],
)
def test_where_the_yaml_says_nothing_the_json_decides_for_the_whole_run(
    tmp_path: Path, path: str, value: Any, key: str, adopted: Any
) -> None:
    loaded = load(tmp_path, nested(path, value))
    assert at(loaded.config.model_dump(by_alias=True), key) == adopted
    assert loaded.origins[key] == line_of(tmp_path / "deepspeed.json", path.rpartition(".")[2])


def test_zero_auto_takes_the_stage_of_the_json_also_when_it_is_written(tmp_path: Path) -> None:
    assert (
        settled(load(tmp_path, nested("zero_optimization.stage", 2), "zero=auto")).settings["zero_optimization"][
            "stage"
        ]
        == 2
    )


def test_without_a_file_every_setting_comes_from_the_yaml(tmp_path: Path) -> None:
    resolved = settled(load_run(write_recipe(tmp_path), ["precision=bf16"]))
    assert resolved.settings["zero_optimization"]["stage"] == DEFAULT_STAGE
    assert resolved.settings["bf16"] == {"enabled": True}
    assert resolved.settings["gradient_clipping"] == 1.0
    assert "train_batch_size" not in resolved.settings


def test_an_adopted_value_must_be_one_that_the_yaml_could_say(tmp_path: Path) -> None:
    message = refusal(tmp_path, nested("zero_optimization.stage", 7))
    assert "`zero` should be" in message
    assert f"{tmp_path}/deepspeed.json:3" in message


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_what_dist_lm_does_itself_is_refused_with_the_reason(tmp_path: Path, key: str) -> None:
    message = refusal(tmp_path, {key: {"enabled": False}})
    assert f"`{key}` does not belong" in message
    assert f"({tmp_path}/deepspeed.json:2)" in message
    assert REFUSED[key] in message


def test_an_auto_without_a_meaning_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, nested("zero_optimization.overlap_comm", "auto"))
    assert '"auto" has no meaning in `zero_optimization.overlap_comm`' in message
    assert f"{tmp_path}/deepspeed.json:3" in message


def test_bucket_sizes_follow_from_the_width_of_the_model(tmp_path: Path) -> None:
    names = ["reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold"]
    loaded = load(tmp_path, {"zero_optimization": {"stage": 3} | dict.fromkeys(names, "auto")})
    resolved = settled(loaded, hidden_size=100)
    assert [resolved.settings["zero_optimization"][name] for name in names] == [10000, 9000, 1000]
    waiting = settled(loaded, hidden_size=None)
    assert not set(names) & set(waiting.settings["zero_optimization"])
    assert sum("once the model is known" in note for note in waiting.notes) == 3


@pytest.mark.parametrize(
    ("precision", "written", "allowed"),
    [("fp32", "bf16", "Write fp32."), ("fp32", "fp16", "Write fp32."), ("bf16", "fp16", "Write bf16 or fp32.")],
)
def test_gradients_are_summed_only_in_types_that_work(
    tmp_path: Path, precision: str, written: str, allowed: str
) -> None:
    message = refusal(tmp_path, nested("data_types.grad_accum_dtype", written), f"precision={precision}")
    assert line_of(tmp_path / "deepspeed.json", "grad_accum_dtype") in message
    assert f"override `precision={precision}`" in message
    assert allowed in message


def test_offload_that_the_stage_cannot_do_is_refused(tmp_path: Path) -> None:
    block = {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}
    message = refusal(tmp_path, block)
    assert "`offload_param` to cpu needs ZeRO stage 3 or more, the stage is 2" in message
    assert line_of(tmp_path / "deepspeed.json", "offload_param") in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{\n"aio": {},\n"aio": {}\n}', "`aio` is there twice"),
        ('{\n"aio": {},\n// no\n}', "this is not JSON"),
        ('{\n"aio": {},\n}', "this is not JSON"),
        ("[]", "is not a JSON object"),
        ("\xff", "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_plain_json_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load_run(write_recipe(tmp_path), [f"deepspeed={path}"])
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_names_the_line_that_wants_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run(write_recipe(tmp_path), ["deepspeed=nowhere.json"])
    assert "there is no file nowhere.json" in str(caught.value)
    assert "override `deepspeed=nowhere.json`" in str(caught.value)
    with pytest.raises(ConfigError, match=f"cannot read {tmp_path}"):
        load_run(write_recipe(tmp_path), [f"deepspeed={tmp_path}"])


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.stem)
def test_no_shipped_file_leaves_an_auto_and_only_nvme_waits_for_a_folder(tmp_path: Path, shipped: Path) -> None:
    if "nvme" in shipped.stem:
        with pytest.raises(ConfigError) as caught:
            load_run(write_recipe(tmp_path), [f"deepspeed={shipped}"])
        assert "nvme_path` names no folder" in str(caught.value)
        assert line_of(shipped, "nvme_path") in str(caught.value)
    values = json.loads(shipped.read_text().replace("SET_ME", str(tmp_path)))
    left = [path for path in auto_paths(settings(tmp_path, values)) if path not in AUTO_IN_DEEPSPEED]
    assert left == []


def test_without_origins_what_was_set_counts_as_explicit(tmp_path: Path) -> None:
    path = write_deepspeed(tmp_path, {"gradient_clipping": 2.0})
    values = load_run(write_recipe(tmp_path)).config.model_dump(by_alias=True, exclude_unset=True)
    values["deepspeed"] = path
    sizes = {"world_size": 2, "micro_rows": 8, "micro_steps": 4}
    assert resolve(RunConfig.model_validate(values), **sizes).settings["gradient_clipping"] == 2.0
    values["optim"]["clip"] = 1.0
    with pytest.raises(ConfigError, match="set twice"):
        resolve(RunConfig.model_validate(values), **sizes)
