"""The data section: one data set or a mixture, stages, held-out sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_lm.config import SourceSpec
from dist_lm.config_files import identity, load_config, show
from tests.config_text import BASE, refusal, write

pytestmark = pytest.mark.fast

MIXTURE = """\
data:
  train:
    - {path: data/wiki/train, weight: 0.7}
    - {path: data/code/train, weight: 0.3, name: source-code}
    - data/books
  stages:
    - {from_step: 50, weights: {wiki: 0.2}}
    - {from_step: 80, weights: {wiki: 0, books: 2}}
  heldout: {wiki: data/wiki/heldout, code: data/code/heldout}
  tokenizer: tokenizer
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mixed(text: str = MIXTURE) -> str:
    return write("c.yaml", BASE.replace("data: {train: shards/train, tokenizer: tokenizer}\n", text))


def test_a_mixture_is_a_list_of_locations_and_sections() -> None:
    data = load_config(Path(mixed())).config.data
    assert data.sources == (
        SourceSpec(path="data/wiki/train", weight=0.7),
        SourceSpec(path="data/code/train", weight=0.3, name="source-code"),
        SourceSpec(path="data/books"),
    )
    assert [(stage.from_step, stage.weights) for stage in data.stages] == [
        (50, {"wiki": 0.2}),
        (80, {"wiki": 0.0, "books": 2.0}),
    ]
    assert data.heldout_sets == {"wiki": "data/wiki/heldout", "code": "data/code/heldout"}


def test_one_data_set_is_a_mixture_of_one() -> None:
    data = load_config(Path(write("c.yaml", BASE)), ["data.heldout=held"]).config.data
    assert data.sources == (SourceSpec(path="shards/train"),)
    assert data.heldout_sets == {"": "held"}
    assert load_config(Path("c.yaml")).config.data.heldout_sets == {}


def test_what_is_shown_of_a_mixture_can_be_read_again() -> None:
    loaded = load_config(Path(mixed()))
    assert '"path": "data/wiki/train"' in show(loaded)
    dumped = loaded.config.model_dump(mode="json", by_alias=True)
    assert type(loaded.config).model_validate(dumped) == loaded.config


def test_stages_belong_to_the_identity_of_a_run_and_paths_do_not() -> None:
    moved = [
        "data.heldout={wiki: elsewhere}",
        "data.train=[{path: x/wiki/train, weight: 1}, {path: code, name: source-code}, books]",
    ]
    one = identity(load_config(Path(mixed())).config)
    assert identity(load_config(Path("c.yaml"), moved).config) == one
    assert identity(load_config(Path("c.yaml"), ["data.stages=[]"]).config) != one


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.train=[{path: a, wieght: 1}]",
            r"data.train[0]: wieght: Extra inputs are not permitted (keys: path, weight,",
        ),
        ("data.train=[a, {weight: 1}]", "data.train[1]: path: Field required"),
        ("data.train=[{path: a, weight: -1}]", "data.train[0]: weight: Input should be greater than or equal to 0"),
        ("data.train=[{path: a, weight: .nan}]", "data.train[0]: weight: Input should be a finite number"),
        ("data.train=[{path: a, name: 'a b'}]", "data.train[0]: name: String should match pattern"),
        ("data.train=[]", "data.train is a location or a list of sources"),
        ("data.train=[[a]]", "data.train[0]: item: Input should be a valid dictionary"),
        ("data.train=5", "data.train is a location or a list of sources"),
        ("data.heldout=[a, b]", "data.heldout is a location, or several by name"),
        ("data.heldout={a: 1}", "data.heldout is a location, or several by name"),
        (
            "data.stages=[{from_step: 1, weights: {wiki: 1}}]",
            "data.stages[0]: from_step: Input should be greater than or",
        ),
        (
            "data.stages=[{from_step: 9, weights: {wiki: -1}}]",
            "data.stages[0]: weights.wiki: Input should be greater than",
        ),
        ("data.stages=[{from_step: 9, weights: {}}, {from_step: 9, weights: {}}]", "begin at steps that do not grow"),
        ("data.stages=[{from_step: 900, weights: {wiki: 1}}]", "data.stages begin at step 900, after run.steps 100"),
        ("data.stages=5", "data.stages is a list of sections with from_step and weights"),
        ("data.train=a", "data.stages has no effect: data.train is not a mixture"),
    ],
)
def test_a_wrong_mixture_is_refused_with_the_item_and_the_place(override: str, message: str) -> None:
    said = refusal(mixed(), override)
    assert message in said
    assert override in said or "c.yaml:" in said


def test_balanced_weights_need_one_data_set() -> None:
    said = refusal(mixed(), "task={name: classification, class_weights: balanced}")
    assert "task.class_weights balanced is for one data set" in said


@pytest.mark.parametrize("location", ["https://anna:pass-word@host/train", "https://host/train?sig=pass-word"])
@pytest.mark.parametrize("key", ["data.train", "data.heldout", "run.checkpoints"])
def test_a_url_with_a_secret_is_refused_and_not_shown(key: str, location: str) -> None:
    write("c.yaml", BASE)
    message = refusal("c.yaml", f"{key}={location}")
    assert f"{key} holds a URL with a password or a query string" in message
    assert "pass-word" not in message


def test_urls_without_secrets_pass_and_the_cache_decides_nothing_of_what_is_computed() -> None:
    write("c.yaml", BASE)
    plain = ["data.train=abfss://box@account.dfs.core.windows.net/train", "data.heldout=s3://bucket/held"]
    loaded = load_config(Path("c.yaml"), plain)
    cached = load_config(Path("c.yaml"), [*plain, "data.cache.dir=cached", "data.cache.limit_gb=0.5"])
    assert identity(loaded.config) == identity(cached.config)
    assert cached.config.data.cache.limit_gb == 0.5
