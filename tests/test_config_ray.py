"""The `ray:` section: what it takes, where its values come from, and that it is no part of the identity."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.config_files import identity, load_config, schema, show
from dist_lm.config_ray import WorkerRange
from dist_lm.errors import ConfigError
from tests.recipe_text import RECIPE

pytestmark = pytest.mark.fast


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(
    ("written", "workers"),
    [("8", WorkerRange(min=8, max=8)), ("{min: 4, max: 16}", WorkerRange(min=4, max=16))],
)
def test_workers_are_a_number_or_a_range(written: str, workers: WorkerRange, recipe: Path) -> None:
    recipe.write_text(f"{RECIPE}\nray: {{workers: {written}}}\n")
    assert load_config(recipe).config.ray.workers == workers
    assert load_config(recipe, [f"ray.workers={written}"]).config.ray.workers == workers


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("ray.workers=0", "`ray.workers.min` should be greater than 0"),
        ("ray.workers=many", "ray.workers `many` is neither a number nor {min: N, max: N}"),
        ("ray.workers=true", "ray.workers `True` is neither"),
        ("ray.workers={min: 4, max: 2}", "ray.workers.min 4 is more than ray.workers.max 2"),
        ("ray.workers={min: 4}", "`ray.workers.max` is missing"),
        ("ray.workers={mn: 4, max: 8}", "did you mean `ray.workers.min`?"),
        ("ray.num_workers=4", "remove it: ray.workers says it under Ray"),
        ("ray.placement=NEAR", "`ray.placement` should be 'PACK', 'SPREAD'"),
        ("ray.resources_per_worker={GPU: 0}", "`ray.resources_per_worker.GPU` should be greater than 0"),
    ],
)
def test_a_mistake_is_told_with_its_place(override: str, told: str, recipe: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(recipe, [override])
    assert told in str(refused.value)
    assert f"override `{override}`" in str(refused.value)


def test_without_a_number_there_is_none_and_the_origin_of_one_is_that_of_both_ends(recipe: Path) -> None:
    assert load_config(recipe).config.ray.workers is None
    assert show(load_config(recipe, ["ray.workers=3"])).count("override `ray.workers=3`") == 2


def test_other_machines_are_the_same_run(recipe: Path) -> None:
    few = load_config(recipe, ["ray.workers=1"]).config
    many = load_config(recipe, ["ray.workers={min: 1, max: 9}", "ray.label_selector={market: spot}"]).config
    assert identity(few) == identity(many)


def test_the_schema_for_editors_takes_both_forms() -> None:
    forms = schema()["$defs"]["RaySection"]["properties"]["workers"]["anyOf"]
    assert {"type": "integer", "minimum": 1} in forms
    assert any("WorkerRange" in form.get("$ref", "") for form in forms)
