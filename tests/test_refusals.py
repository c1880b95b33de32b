"""What is refused before anything is read or started: each with the words that say why."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import BertConfig
from typer.testing import CliRunner

from dist_lm import disk, trained
from dist_lm.cli import app
from dist_lm.cluster.local import free_port
from dist_lm.config_files import load_config
from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.mixture import Mixture, Stage
from dist_lm.data.order import Order
from dist_lm.data.preparation.runners import ray_slots
from dist_lm.demo import Demo
from dist_lm.errors import ConfigError, DataError, DistLMError, EnvironmentFault
from dist_lm.export import export
from dist_lm.local_training import start
from dist_lm.plan.probe import measure
from dist_lm.ranks import Ranks
from dist_lm.run_dir import RunDir
from dist_lm.run_model import choose_checkpoint
from tests.recipe_text import write_recipe

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["export", "RUN", "--out", "OUT", "--dtype", "int4"], "--dtype int4 is unknown"),
        (["predict", "--from", "RUN", "--in", "x.jsonl", "--out", "OUT", "--ranks", "0"], "--ranks 0 is too small"),
        (["eval", "--from", "RUN", "--in", "x.jsonl", "--field", "text"], "--field text names no two fields"),
        (["plan", "-c", "RECIPE", "--mfu", "40"], "--mfu 40.0 is not a share"),
        (["plan", "-c", "RECIPE", "--probe", "4", "--gpu", "h100"], "--probe runs on CPU ranks"),
        (["export", "OUT", "--out", "MODEL"], "OUT is not a run folder"),
        (["predict", "--from", "NOWHERE", "--in", "x.jsonl", "--out", "MODEL"], "NOWHERE does not exist"),
    ],
)
def test_a_command_line_that_cannot_be_meant(words: list[str], what: str, tmp_path: Path) -> None:
    places = {name: str(tmp_path / name.lower()) for name in ("RUN", "OUT", "MODEL", "NOWHERE")}
    places["RECIPE"] = str(write_recipe(tmp_path))
    (tmp_path / "out").mkdir()
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text.replace("x.jsonl", str(tmp_path / "x.jsonl"))

    done = CliRunner().invoke(app, [placed(word) for word in words])
    assert isinstance(done.exception, ConfigError), done.output
    assert done.exception.what == placed(what)


def run_without_checkpoints(folder: Path) -> RunDir:
    run_dir = RunDir(folder / "run")
    run_dir.begin()
    disk.write_json(run_dir.identity, {"run.steps": 3})
    return run_dir


def test_a_run_without_checkpoints_or_a_best_one_has_nothing_to_export(tmp_path: Path) -> None:
    run_dir = run_without_checkpoints(tmp_path)
    with pytest.raises(ConfigError, match="has no checkpoint"):
        choose_checkpoint(run_dir, "latest")
    with pytest.raises(ConfigError, match="knows no best checkpoint"):
        choose_checkpoint(run_dir, "best")
    (run_dir.checkpoints / "BEST.json").write_text("{")
    with pytest.raises(DataError, match="the note of the best checkpoint cannot be read"):
        choose_checkpoint(run_dir, "best")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="exists already"):
        export(str(run_dir.path), tmp_path / "full")


def mixture(*stages: Stage) -> Mixture:
    return Mixture(["a", "b"], stages, seed=0, lanes=1)


ORDERS: list[tuple[Callable[[], object], type[DistLMError], str]] = [
    (lambda: Order([10], seed=-1, lanes=1, era=1), ConfigError, "the seed -1 is outside"),
    (lambda: Order([10], seed=0, lanes=0, era=1), ConfigError, r"lanes \(0\) and era \(1\) must be positive"),
    (lambda: Order([10], seed=0, lanes=11, era=1), DataError, "11 lanes cannot share 10 rows"),
    (
        lambda: HeldoutRows("x", rank=2, world_size=2, micro_rows=1, seq_len=None, partner_columns=(), seed=0),
        ConfigError,
        "rank 2 is not one of 2 ranks",
    ),
    (
        lambda: HeldoutRows("x", rank=0, world_size=2, micro_rows=0, seq_len=None, partner_columns=(), seed=0),
        ConfigError,
        "micro_rows .* must be positive",
    ),
    (lambda: mixture(Stage(0, (1, 1)), Stage(0, (1, 2))), ConfigError, "stages of a mixture begin at positions"),
    (lambda: mixture(Stage(0, (1, 0))), ConfigError, "the source 'b' has weight 0 from beginning to end"),
]


@pytest.mark.parametrize(("make", "kind", "words"), ORDERS, ids=[words for *_, words in ORDERS])
def test_an_order_of_data_that_cannot_be(make: Callable[[], object], kind: type[DistLMError], words: str) -> None:
    with pytest.raises(kind, match=words):
        make()


def test_a_model_whose_class_or_head_nobody_knows() -> None:
    with pytest.raises(ConfigError, match="SimpleNamespace has no head that predict and eval know"):
        trained.task_of(SimpleNamespace(), {}, "x")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="the model's class NoSuchModel is unknown to transformers"):
        trained.model_class(BertConfig(architectures=["NoSuchModel"]), "x")


def test_without_a_gpu_the_number_of_cpu_ranks_has_to_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    recipe = write_recipe(tmp_path)
    with pytest.raises(ConfigError, match="no GPU is visible"):
        start(load_config(recipe), recipe, [], cpu=0, max_restarts=0)


def test_a_stage_of_the_demo_that_fails_ends_it_with_its_command(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="a stage of the demo ended with code 3") as caught:
        Demo(tmp_path).run("data", "verify", tmp_path / "nowhere")
    assert caught.value.where == f"dist-lm data verify {tmp_path}/nowhere"


def test_a_probe_needs_steps_behind_its_warm_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--probe 3 steps are too few"):
        measure(tmp_path / "x.yaml", [], ranks=1, steps=3)


def test_a_probe_whose_run_is_refused_tells_the_runs_own_words(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="the probe ended with exit code 2") as caught:
        measure(write_recipe(tmp_path), ["optim.speed=1"], ranks=1, steps=4)
    assert "`optim.speed`" in caught.value.why


def test_a_machine_where_no_ray_runs_has_no_cluster_for_tasks(tmp_path: Path) -> None:
    # Ray looks for its heads among all processes: here there are none.
    alone = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]
    program = "from dist_lm.data.preparation.runners import ray_slots; ray_slots()"
    environment = {**os.environ, "RAY_ADDRESS": "auto", "RAY_TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [*alone, sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False
    )
    assert "error[environment] the Ray cluster `auto` cannot be joined" in done.stderr


def test_an_address_of_ray_that_nobody_answers_at_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(EnvironmentFault, match=f"nobody answers at {address}"):
        ray_slots()


def test_a_process_that_no_launcher_started_has_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(EnvironmentFault, match=r"this process does not know its rank: .*RANK"):
        Ranks.connect()
