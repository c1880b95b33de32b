"""RunConfig: a configuration that exists is frozen, known and consistent."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from dist_lm.config import ClassificationTask, MlmTask, RunConfig
from tests.recipe_text import RECIPE

pytestmark = pytest.mark.fast


def values(**changes: Any) -> dict[str, Any]:
    """The recipe's values with dotted keys replaced: `batch__micro=4`."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE)
    for key, value in changes.items():
        *sections, name = key.split("__")
        section = recipe
        for part in sections:
            section = section.setdefault(part, {})
        section[name] = value
    return recipe


def build(**changes: Any) -> RunConfig:
    return RunConfig.model_validate(values(**changes))


def test_the_sections_take_the_names_that_people_write() -> None:
    config = build(model={"from": "weights"})
    assert (config.batch.global_rows, config.batch.micro_rows) == (64, 8)
    assert str(config.model.weights) == "weights"


def test_defaults_are_filled_in() -> None:
    config = build()
    assert (config.precision, config.zero, config.deepspeed) == ("fp32", "auto", None)
    assert (config.optim.clip, config.optim.betas, config.run.keep) == (1.0, (0.9, 0.999), 3)


def test_a_configuration_cannot_be_changed() -> None:
    config = build()
    with pytest.raises(ValidationError, match="frozen"):
        config.optim.lr = 1.0  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.precision = "bf16"  # type: ignore[misc]


def test_the_name_decides_which_task_it_is() -> None:
    assert isinstance(build().task, MlmTask)
    assert isinstance(build(task={"name": "classification"}).task, ClassificationTask)
    with pytest.raises(ValidationError, match="mask_probability"):
        build(task={"name": "classification", "mask_probability": 0.1})


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"batch__global": 0}, "global"),
        ({"batch__micro": -1}, "micro"),
        ({"optim__lr": 0}, "lr"),
        ({"optim__lr": float("inf")}, "lr"),
        ({"optim__lr": float("nan")}, "lr"),
        ({"optim__clip": -0.1}, "clip"),
        ({"optim__betas": [0.9, 1.0]}, "betas"),
        ({"run__steps": 0}, "steps"),
        ({"run__seed": 2**63}, "seed"),
        ({"run__keep": 0}, "keep"),
        ({"task__mask_probability": 0}, "mask_probability"),
        ({"task__mask_share": 1.1}, "mask_share"),
        ({"precision": "int8"}, "precision"),
        ({"zero": 4}, "zero"),
        ({"optim__name": "lamb"}, "name"),
        ({"colour": "red"}, "colour"),
        ({"run__colour": "red"}, "colour"),
    ],
)
def test_values_that_make_no_sense_are_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**change)
    assert any(key in error["loc"] for error in caught.value.errors())


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"batch__micro": 65}, ["batch.micro", "batch.global"]),
        ({"optim__schedule__warmup_steps": 101}, ["optim.schedule.warmup_steps", "run.steps"]),
        ({"optim__schedule__decay_steps": 5}, ["optim.schedule.decay_steps", "kind cosine"]),
        (
            {"optim__schedule": {"kind": "wsd", "warmup_steps": 60, "decay_steps": 41}},
            ["warmup_steps 60", "decay_steps 41", "run.steps 100"],
        ),
        ({"run__eval_every": 10}, ["run.eval_every", "data.heldout"]),
        ({"run__best": {}}, ["run.best", "data.heldout"]),
        ({"run__early_stop": {}}, ["run.early_stop", "data.heldout"]),
        ({"precision": "fp16", "zero": 0}, ["precision fp16", "zero 1, 2 or 3"]),
        ({"task__mask_share": 0.9, "task__random_share": 0.2}, ["task.mask_share", "task.random_share"]),
    ],
)
def test_a_rule_over_two_keys_names_both(change: dict[str, Any], keys: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        build(**change)
    for key in keys:
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"batch__micro": 64},
        {"optim__schedule": {"kind": "wsd", "warmup_steps": 60, "decay_steps": 40}},
        {"run__eval_every": 10, "data__heldout": "data/heldout"},
        {"precision": "fp16", "zero": 1},
        {"run__save_every": "11h30min", "run__time_limit": "2d"},
        {"batch__micro": "auto"},
        {"task__mask_share": 0.7, "task__random_share": 0.3},
    ],
)
def test_the_edge_of_each_rule_is_allowed(change: dict[str, Any]) -> None:
    build(**change)


def test_all_broken_rules_are_told_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        build(batch__micro=65, run__eval_every=10, optim__schedule__warmup_steps=101)
    for key in ("batch.micro", "run.eval_every", "optim.schedule.warmup_steps"):
        assert key in str(caught.value)
