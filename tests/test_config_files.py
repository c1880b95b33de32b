"""Loading configurations: origins, overrides, layers, identity."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from dist_lm.config_files import identity, identity_diff, load_config, schema, show
from dist_lm.deepspeed_config import load_run
from tests.config_text import BASE, refusal, write

pytestmark = pytest.mark.fast

REPOSITORY = Path(__file__).parent.parent
RECIPES = sorted((REPOSITORY / "launch" / "recipes").glob("*.yaml"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with base.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    return tmp_path


# -- values and origins


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_with_its_deepspeed_file(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    loaded = load_run(recipe.relative_to(REPOSITORY))
    assert loaded.origins["run.steps"].startswith(f"launch/recipes/{recipe.name}:")


def test_every_value_knows_its_file_and_line(folder: Path) -> None:
    loaded = load_config(Path("base.yaml"), ["optim.weight_decay=0.1"])
    assert loaded.config.optim.lr == 1e-4
    assert loaded.config.run.steps == 100
    assert loaded.origins["optim.lr"] == "base.yaml:11"
    assert loaded.origins["optim.schedule.kind"] == "base.yaml:12"
    assert loaded.origins["optim.weight_decay"] == "override `optim.weight_decay=0.1`"
    assert loaded.origins["optim.clip"] == "default"
    assert loaded.origins["model.size"] == "default"


def test_the_last_override_of_a_key_counts(folder: Path) -> None:
    loaded = load_config(Path("base.yaml"), ["optim.lr=1e-2", "optim.lr=3e-4"])
    assert loaded.config.optim.lr == 3e-4
    assert loaded.origins["optim.lr"] == "override `optim.lr=3e-4`"


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=1e-5", "lr", 1e-5),
        ("optim.betas=[0.9, 0.98]", "betas", (0.9, 0.98)),
        ("optim.clip=0", "clip", 0.0),
        ("optim.schedule={warmup_steps: 7}", "schedule.warmup_steps", 7),
    ],
)
def test_an_override_is_read_as_yaml(folder: Path, override: str, key: str, value: object) -> None:
    found: object = load_config(Path("base.yaml"), [override]).config.optim
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value


def test_an_override_of_one_key_of_the_task_leaves_the_others(folder: Path) -> None:
    task = load_config(Path("base.yaml"), ["task.mask_unit=word"]).config.task
    assert task.name == "mlm"
    assert task.mask_unit == "word"
    assert task.mask_probability == 0.2


def test_another_task_drops_the_settings_of_the_first(folder: Path) -> None:
    loaded = load_config(Path("base.yaml"), ["task.name=classification"])
    assert loaded.config.task.name == "classification"
    assert loaded.origins["task.name"] == "override `task.name=classification`"


def test_null_by_override_takes_an_optional_value_away(folder: Path) -> None:
    overrides = ["data.heldout=shards/heldout", "data.heldout=null"]
    assert load_config(Path("base.yaml"), overrides).config.data.heldout is None


def test_numbers_with_an_exponent_stay_numbers_where_no_type_is_known(folder: Path) -> None:
    write("c.yaml", BASE.replace("model:", "model: {overrides: {layer_norm_eps: 1e-12, hidden_size: 64}}"))
    assert load_config(Path("c.yaml")).config.model.overrides == {"layer_norm_eps": 1e-12, "hidden_size": 64}


def test_relative_paths_count_from_the_working_directory(folder: Path) -> None:
    write("deep/er/c.yaml", BASE)
    assert load_config(Path("deep/er/c.yaml")).config.data.train == "shards/train"


def test_environment_variables_are_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPTIM__LR", "9")
    monkeypatch.setenv("RUN_DIR", "elsewhere")
    write("c.yaml", BASE.replace("runs/x", "$RUN_DIR/x"))
    config = load_config(Path("c.yaml")).config
    assert config.optim.lr == 1e-4
    assert config.run.dir == Path("$RUN_DIR/x")


# -- extends


def test_a_file_extends_another_beside_it_key_by_key(folder: Path) -> None:
    write("deep/base.yaml", BASE)
    write("deep/c.yaml", "extends: base.yaml\noptim:\n  lr: 3e-4\n")
    loaded = load_config(Path("deep/c.yaml"))
    assert loaded.config.optim.lr == 3e-4
    assert loaded.config.optim.schedule.warmup_steps == 10
    assert loaded.origins["optim.lr"] == "deep/c.yaml:3"
    assert loaded.origins["optim.schedule.warmup_steps"] == "deep/base.yaml:12"


def test_files_that_extend_each_other_are_refused(folder: Path) -> None:
    write("a.yaml", "# a\nextends: b.yaml\n")
    write("b.yaml", "extends: a.yaml\n")
    message = refusal("a.yaml")
    assert "a.yaml -> b.yaml -> a.yaml" in message
    assert "b.yaml:1" in message


def test_a_missing_base_names_the_line_that_wants_it(folder: Path) -> None:
    write("c.yaml", "# c\nextends: bass.yaml\n")
    message = refusal("c.yaml")
    assert "c.yaml:2" in message
    assert "bass.yaml" in message
    assert "did you mean base.yaml?" in message


@pytest.mark.parametrize("value", ["[base.yaml]", "7", "''"])
def test_extends_names_exactly_one_file(folder: Path, value: str) -> None:
    write("c.yaml", f"extends: {value}\n")
    assert "c.yaml:1" in refusal("c.yaml")


# -- files that are not configurations


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "c.yaml is empty"),
        ("# only a comment\n", "c.yaml is empty"),
        ("- a\n- b\n", "c.yaml:1"),
        ("task: {name: mlm\nrun: 3\n", "not YAML   (c.yaml:2)"),
        ("task:\n\tname: mlm\n", "not YAML   (c.yaml:2)"),
        ("task: {name: mlm}\n---\nrun: 3\n", "not YAML   (c.yaml:2)"),
        ("run:\n  3: x\n", "c.yaml:2"),
        ("run: !!python/object/apply:os.getcwd []\n", "c.yaml:1"),
        ("a: &a\n  b: *a\n", "an alias contains itself"),
        ("base: &b {x: 1}\nrun:\n  <<: *b\n", "Use `extends: other.yaml`"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(folder: Path, text: str, words: str) -> None:
    assert words in refusal(write("c.yaml", text))


def test_a_key_that_is_there_twice_is_refused_with_both_lines(folder: Path) -> None:
    message = refusal(write("c.yaml", BASE + "  steps: 7\n"))
    assert "`steps` is there twice" in message
    assert "c.yaml:16" in message
    assert "c.yaml:15" in message


def test_a_missing_file_says_which_one_was_meant(folder: Path) -> None:
    message = refusal("base.yml")
    assert "there is no file base.yml" in message
    assert "did you mean base.yaml?" in message


def test_a_folder_and_bytes_that_are_no_text_are_refused(folder: Path) -> None:
    Path("folder.yaml").mkdir()
    assert "cannot read folder.yaml" in refusal("folder.yaml")
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00run")
    assert "bytes.yaml is not UTF-8" in refusal("bytes.yaml")


# -- identity


def test_identity_survives_a_move_and_another_division_of_the_work(folder: Path) -> None:
    overrides = ["batch.micro=8", "zero=3", "run.dir=/elsewhere", "data.train=moved", "run.log_every=1"]
    overrides += ["run.save_every=7", "run.keep=9", "run.allow_change=[optim]", "data.tokenizer=moved"]
    first = identity(load_config(Path("base.yaml")).config)
    assert identity(load_config(Path("base.yaml"), overrides).config) == first


@pytest.mark.parametrize(
    "override",
    [
        "task.mask_unit=word",
        "model.size=small",
        "model.overrides.hidden_size=64",
        "data.era=512",
        "batch.global=128",
        "optim.lr=0.0002",
        "optim.schedule.kind=linear",
        "run.seed=2",
        "run.steps=200",
        "precision=bf16",
    ],
)
def test_identity_knows_every_value_that_changes_the_result(folder: Path, override: str) -> None:
    old = identity(load_config(Path("base.yaml")).config)
    new = identity(load_config(Path("base.yaml"), [override]).config)
    key, _, value = override.partition("=")
    assert any(line.startswith(f"{key}: ") and value in line for line in identity_diff(old, new))
    assert identity_diff(old, new, allow=[key, "model"]) == []


def test_identity_is_the_same_after_a_round_trip_through_json(folder: Path) -> None:
    values = identity(load_config(Path("base.yaml")).config)
    assert identity_diff(json.loads(json.dumps(values)), values) == []
    assert identity_diff({"optim.clip": 1}, {"optim.clip": 1.0}) == []


def test_identity_diff_shows_both_values_and_honours_permissions() -> None:
    old, new = {"optim.lr": 0.1, "run.steps": 5, "gone": 1}, {"optim.lr": 0.2, "run.steps": 5, "came": None}
    assert identity_diff(old, new) == ["optim.lr: 0.1 -> 0.2", "gone: 1 -> absent", "came: absent -> null"]
    assert identity_diff(old, new, allow=["optim", "gone", "came"]) == []
    # `optim` is no permission for `optimism`.
    assert identity_diff({"optimism": 1}, {"optimism": 2}, allow=["optim"]) == ["optimism: 1 -> 2"]


# -- show and schema


def test_show_has_a_line_with_value_and_origin_for_every_key(folder: Path) -> None:
    lines = show(load_config(Path("base.yaml"), ["optim.betas=[0.9, 0.98]"])).splitlines()
    table = {line.split()[0]: line for line in lines}
    assert table["optim.betas"].split(maxsplit=1)[1].startswith("[0.9, 0.98]")
    assert table["run.dir"].endswith("base.yaml:14")
    assert table["data.heldout"].split()[1:] == ["null", "default"]
    columns = {line.index("base.yaml:") for line in lines if "base.yaml:" in line}
    assert len(columns) == 1


def test_the_schema_accepts_what_loads_and_refuses_what_does_not(folder: Path) -> None:
    checker = jsonschema.Draft202012Validator(schema())
    values = yaml.safe_load(BASE.replace("model:\n", "").replace("1e-4", "1.0e-4").replace("1e2", "100"))
    assert list(checker.iter_errors(values)) == []
    assert list(checker.iter_errors({**values, "learning_rate": 1}))
    assert list(checker.iter_errors({**values, "zero": 4}))
