"""`deepspeed`, `torchrun` and our launcher: exit codes, and runs that move from one to the other."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_lm.cluster.local import free_port
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import REPOSITORY, losses, run_command, train_locally, write_recipe
from tests.terminal import Shown, run_on_terminal

RANK = REPOSITORY / "launch" / "train.py"
PROGRAMS = Path(sys.executable).parent
KILL = "kill@rank1:step5:after_step"
DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}
"""Makes equal losses say that the random numbers are equal, too."""


def deepspeed_words(recipe: Path, *overrides: str) -> list[str | Path]:
    launcher = [PROGRAMS / "deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())]
    return [*launcher, RANK, "-c", recipe, *overrides]


def by_deepspeed(recipe: Path, *overrides: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    return run_command(deepspeed_words(recipe, *overrides), env={"DIST_LM_FAULT": fault})


def by_torchrun(recipe: Path, *overrides: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    launcher = [PROGRAMS / "torchrun", "--nproc-per-node", "2", "--master-port", str(free_port())]
    return run_command([*launcher, RANK, "-c", recipe, *overrides], env={"DIST_LM_FAULT": fault})


def by_us(recipe: Path, *overrides: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    return train_locally(recipe, *overrides, env={"DIST_LM_FAULT": fault})


LAUNCHERS = {"deepspeed": by_deepspeed, "torchrun": by_torchrun, "local": by_us}


def shared_memory() -> set[Path]:
    """Buffers of DeepSpeed's own reductions on a CPU."""
    return set(Path("/dev/shm").glob("deepspeed_*"))


def recipe_in(folder: Path, data: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return write_recipe(folder / "recipe.yaml", data, zero=2, batch__micro=8, **DROPOUT)


@pytest.fixture(scope="module")
def on_terminal(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Shown, Path]:
    """A run that nothing happens to, by our launcher on a terminal."""
    folder = tmp_path_factory.mktemp("calm")
    recipe = recipe_in(folder, topics_data)
    words = [sys.executable, "-m", "dist_lm", "train", "-c", recipe, "--cpu", "2", "run.peak_tflops=1"]
    return run_on_terminal(words), folder / "run"


@pytest.fixture(scope="module")
def calm(on_terminal: tuple[Shown, Path]) -> dict[int, float]:
    """Its losses."""
    shown, run = on_terminal
    assert shown.exit_code == 0, shown.text
    return losses(run)


def test_a_terminal_shows_a_view_while_a_run_trains_and_a_summary_in_its_place(
    on_terminal: tuple[Shown, Path],
) -> None:
    shown, run = on_terminal
    assert_view_then_summary(shown)
    (record, *_) = read_metrics(run / "metrics.jsonl", "train")
    # Of a peak of 1 TFLOP/s.
    assert record["mfu"] == record["tflops"] > 0
    kept = (run / "logs" / "rank-00000.log").read_text()
    assert kept.count("tok/s") == len(read_metrics(run / "metrics.jsonl", "train")) == 6


def assert_view_then_summary(shown: Shown) -> None:
    last = shown.text
    for name in ("loss", "rate", "time", "memory", "optimizer", "saved", "now"):
        assert any(f"\n{name} " in frame for frame in shown.frames_with("waiting for data")), name
    assert "mlm  2 x cpu  attempt" in last
    assert "saves   every" in last
    assert "done    step 6 of 6" in last
    assert "waiting for data" not in last, "the view has left the terminal"
    assert "tok/s" not in last, "no lines of records beside it"
    assert not shown.cursor_hidden


@pytest.mark.parametrize(("first", "second"), [("deepspeed", "torchrun"), ("torchrun", "deepspeed")])
def test_a_run_that_died_under_one_launcher_goes_on_under_another_with_equal_losses(
    first: str, second: str, calm: dict[int, float], topics_data: Path, tmp_path: Path
) -> None:
    recipe = recipe_in(tmp_path, topics_data)
    left_before = shared_memory()
    died = LAUNCHERS[first](recipe, fault=KILL)
    assert died.returncode not in (0, 2, 75), died.stdout + died.stderr
    # The last line may be of step 5: rank 0 may have been as far as that.
    assert max(losses(tmp_path / "run")) < 6
    if second == "deepspeed":
        shown = run_on_terminal(deepspeed_words(recipe))
        told = shown.text
        assert shown.exit_code == 0, told
        assert_view_then_summary(shown)
    else:
        done = LAUNCHERS[second](recipe)
        assert done.returncode == 0, done.stdout + done.stderr
        told = done.stdout
        assert "tok/s" in told, "a line a record"
        assert "\x1b" not in told
    assert "resume  step 3 " in told
    assert losses(tmp_path / "run") == calm
    run_dir = RunDir(tmp_path / "run")
    assert [run_dir.attempt_facts(number)["launcher"] for number in (1, 2)] == [first, second]
    # What DeepSpeed's launcher would have its ranks make, and leave there.
    assert shared_memory() <= left_before


@pytest.mark.parametrize(("launcher", "exit_code"), [("deepspeed", 2), ("torchrun", 1), ("local", 2)])
def test_a_configuration_error_is_told_and_touches_nothing(
    launcher: str, exit_code: int, topics_data: Path, tmp_path: Path
) -> None:
    # torchrun has one exit code for every failed rank; it prints the rank's own.
    done = LAUNCHERS[launcher](recipe_in(tmp_path, topics_data), "optim.lrr=1")
    assert done.returncode == exit_code
    assert "error[config] unknown key `optim.lrr`" in done.stderr
    assert "did you mean `optim.lr`?" in done.stderr
    assert not (tmp_path / "run").exists()
