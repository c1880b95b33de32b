"""What a mistake in a configuration says: what, where, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.config_files import load_config
from dist_lm.config_keys import ALIASES, ELSEWHERE, fields_by_key
from tests.config_text import BASE, refusal, write

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with base.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    return tmp_path


# -- wrong keys


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("optim.learning_rate=1", "optim.lr"),
        ("learning_rate=1", "optim.lr"),
        ("per_device_train_batch_size=8", "batch.micro"),
        ("train_batch_size=8", "batch.global"),
        ("max_steps=8", "run.steps"),
        ("output_dir=x", "run.dir"),
        ("warmup_steps=8", "optim.schedule.warmup_steps"),
        ("optim.warmup_steps=8", "optim.schedule.warmup_steps"),
        ("weight-decay=0.1", "optim.weight_decay"),
        ("run.stepz=8", "run.steps"),
        ("batch.global_rows=8", "batch.global"),
        ("model.weights=x", "model.from"),
        ("task.mask_prob=0.1", "task.mask_probability"),
        ("optim.schedule.knd=linear", "optim.schedule.kind"),
        ("fp16=true", "precision"),
    ],
)
def test_an_unknown_key_suggests_the_one_that_was_meant(folder: Path, override: str, meant: str) -> None:
    message = refusal("base.yaml", override)
    assert f"unknown key `{override.partition('=')[0]}`" in message
    assert f"override `{override}`" in message
    assert f"did you mean `{meant}`?" in message


def test_an_unknown_key_in_the_file_has_its_line_and_the_valid_names(folder: Path) -> None:
    message = refusal(write("c.yaml", BASE.replace("  lr: 1e-4", "  learning_rate: 1e-4\n  lr: 1e-4")))
    assert "unknown key `optim.learning_rate`   (c.yaml:11)" in message
    assert "valid: name lr layer_decay weight_decay betas eps momentum clip schedule" in message


@pytest.mark.parametrize("key", ["optim.xyzzy", "optim.nesterov", "optim.amsgrad"])
def test_a_key_like_no_other_lists_the_valid_ones_only(folder: Path, key: str) -> None:
    message = refusal("base.yaml", f"{key}=1")
    assert "did you mean" not in message
    assert "valid: name lr layer_decay weight_decay" in message


def test_every_alias_leads_to_a_key_that_exists() -> None:
    assert set(ALIASES.values()) <= set(fields_by_key())
    assert not set(ALIASES) & set(ELSEWHERE)


def test_a_key_without_a_counterpart_is_explained(folder: Path) -> None:
    message = refusal("base.yaml", "gradient_accumulation_steps=4")
    assert "it follows from batch.global, batch.micro and the number of ranks" in message


def test_an_unknown_task_lists_those_that_exist(folder: Path) -> None:
    message = refusal("base.yaml", "task.name=mllm")
    assert "there is no task `mllm`" in message
    assert "override `task.name=mllm`" in message
    assert "did you mean `mlm`?" in message
    assert "one of: mlm causal_lm span_corruption classification" in message


@pytest.mark.parametrize("task", ["{}", "{name: null}", "{mask_unit: word}", ""])
def test_a_task_without_a_name_lists_those_that_exist(folder: Path, task: str) -> None:
    text = BASE.replace("task:\n  name: mlm\n  mask_probability: 0.2\n", f"task: {task}\n")
    message = refusal(write("c.yaml", text))
    assert "`task.name` is missing   (c.yaml:2)" in message
    assert "one of: mlm causal_lm span_corruption classification" in message


def test_a_key_of_another_task_is_unknown(folder: Path) -> None:
    message = refusal("base.yaml", "task.name=classification", "task.mask_unit=word")
    assert "unknown key `task.mask_unit`" in message


# -- wrong values


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optim.lr=fast", "`optim.lr` should be a valid number"),
        ("optim.lr=-1", "`optim.lr` should be greater than 0, got -1"),
        ("optim.lr=.inf", "`optim.lr` should be a finite number"),
        ("optim.lr=yes", "`optim.lr` should not be true or false"),
        ("optim.betas=[0.9]", "`optim.betas` has too few values"),
        ("optim.betas=[true, 0.9]", "`optim.betas` should not be true or false"),
        ("optim=3", "`optim` should be a section"),
        ("optim.lr=", "`optim.lr` should be a valid number"),
        ("run.steps=2.5", "`run.steps` should be a valid integer"),
        ("run.dir=", "`run.dir` should be a path"),
        ("run.dir=''", "`run.dir` is empty"),
        ("run.dir=~/runs", "`run.dir` begins with `~`"),
        ("run.dir.x=1", "`run.dir` is one value, not a section"),
        ("zero=4", "`zero` should be 'auto', 0, 1, 2 or 3, got 4"),
        ("zero=true", "`zero` should not be true or false"),
        ("optim.schedule.kind=cosin", "'constant', 'linear', 'cosine' or 'wsd', got 'cosin'"),
        ("run.allow_change=optim", "`run.allow_change` should be a list"),
    ],
)
def test_a_wrong_value_names_its_key_and_its_place(folder: Path, override: str, words: str) -> None:
    message = refusal("base.yaml", override)
    assert words in message
    assert f"(override `{override}`)" in message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["optim.momentum=0.5"], "optim.momentum has no effect with optim.name=adamw"),
        (["optim.name=sgd", "optim.betas=[0.8, 0.9]"], "optim.betas has no effect with optim.name=sgd"),
    ],
)
def test_a_key_of_another_optimizer_is_refused(folder: Path, overrides: list[str], words: str) -> None:
    assert words in refusal("base.yaml", *overrides)


def test_a_wrong_value_in_the_file_has_its_line(folder: Path) -> None:
    assert "(c.yaml:9)" in refusal(write("c.yaml", BASE.replace("micro: 16", "micro: some")))


def test_a_missing_key_says_what_it_is_for_and_where_its_section_is(folder: Path) -> None:
    message = refusal(write("c.yaml", BASE.replace("  lr: 1e-4\n", "")))
    assert "`optim.lr` is missing   (c.yaml:10)" in message
    assert "Peak learning rate." in message


def test_a_missing_section_says_what_it_needs(folder: Path) -> None:
    message = refusal(write("c.yaml", BASE.replace("batch:\n  global: 64\n  micro: 16\n", "")))
    assert "`batch` is missing   (c.yaml)" in message
    assert "it needs batch.global, batch.micro" in message


def test_a_broken_rule_names_every_place_that_takes_part(folder: Path) -> None:
    message = refusal("base.yaml", "optim.schedule.warmup_steps=101")
    assert "are more than run.steps 100" in message
    assert "override `optim.schedule.warmup_steps=101`" in message
    assert "base.yaml:15" in message


@pytest.mark.parametrize("override", ["optim.lr", "=3", "optim..lr=3", ".lr=3", ""])
def test_what_is_no_override_is_refused(folder: Path, override: str) -> None:
    assert "is not an override" in refusal("base.yaml", override)


def test_an_override_that_is_no_yaml_is_named(folder: Path) -> None:
    assert "not YAML   (override `optim.betas=[0.9, 0.98`)" in refusal("base.yaml", "optim.betas=[0.9, 0.98")


def test_several_mistakes_are_told_at_once(folder: Path) -> None:
    message = refusal("base.yaml", "optim.learning_rate=1", "zero=4", "run.dir=~/x")
    assert "3 mistakes   (base.yaml)" in message
    assert "did you mean `optim.lr`?" in message
    assert "`zero` should be" in message
    assert "`run.dir` begins with" in message


def test_more_mistakes_than_fit_are_counted(folder: Path) -> None:
    message = refusal("base.yaml", *[f"unknown{number}=1" for number in range(9)])
    assert "9 mistakes" in message
    assert "... and 4 more" in message
    assert message.count("unknown key") == 5


# -- permissions to change


@pytest.mark.parametrize("entry", ["optim.lr", "optim", "data.train", "data.train.fingerprint", "model.overrides.eps"])
def test_a_permission_may_name_a_key_a_section_or_a_part(folder: Path, entry: str) -> None:
    loaded = load_config(Path("base.yaml"), [f"run.allow_change=[{entry}]"])
    assert loaded.config.run.allow_change == (entry,)


def test_a_permission_for_an_unknown_key_is_refused(folder: Path) -> None:
    message = refusal("base.yaml", "run.allow_change=[optim.learning_rate]")
    assert "unknown key `optim.learning_rate`" in message
    assert "did you mean `optim.lr`?" in message
