"""Killed ranks, stop requests and bad input, on real processes of the local launcher."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from dist_lm.checkpoint import commit
from dist_lm.metrics import read_metrics
from dist_lm.report.run_facts import read_run
from dist_lm.run_dir import RunDir
from tests.gloo_ranks import environment
from tests.rank_scenarios import attempt_scenarios, losses, scenario, train_scenarios

DROPOUT = {"model__overrides__hidden_dropout_prob": 0.1, "model__overrides__attention_probs_dropout_prob": 0.1}
COMMON = {"zero": 2, "batch__micro": 8, **DROPOUT}
DEADLINE_S = 300


def command(config: dict[str, Any], folder: Path, *, max_restarts: int = 1) -> list[str]:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(config))
    return [
        *(sys.executable, "-m", "dist_lm", "train", "-c", str(recipe)),
        *("--cpu", "2", "--max-restarts", str(max_restarts)),
    ]


def run(words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment(variables), capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )


@pytest.fixture(scope="module")
def calm(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Losses of the run that nothing happens to."""
    folder = tmp_path_factory.mktemp("calm")
    train_scenarios(folder, [scenario(topics_data, folder / "run", **COMMON)], num_ranks=2)
    return losses(folder / "run")


@pytest.mark.parametrize(
    ("fault", "resumed_step"),
    [
        ("kill@rank1:step5:after_step", 3),
        ("kill@rank1:step3:after_write", 0),
        ("kill@rank0:step3:before_publish", 0),
        ("kill@rank*:step6:in_evaluation", 3),
    ],
)
def test_a_killed_run_goes_on_by_itself_with_equal_losses(
    fault: str, resumed_step: int, calm: dict[int, float], topics_data: Path, tmp_path: Path
) -> None:
    config = scenario(topics_data, tmp_path / "run", **COMMON)
    done = run(command(config, tmp_path), DIST_LM_FAULT=fault)
    assert done.returncode == 0, done.stdout + done.stderr
    # The fault did fire, and the run says so.
    assert "was ended by SIGKILL" in done.stdout
    assert (f"resume  step {resumed_step} " in done.stdout) == bool(resumed_step)
    assert losses(tmp_path / "run") == calm
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))


def test_a_stop_request_saves_and_exits_with_75_and_the_same_command_goes_on(
    calm: dict[int, float], topics_data: Path, tmp_path: Path
) -> None:
    steps = 6
    run_dir = tmp_path / "run"
    config = scenario(topics_data, run_dir, **COMMON)
    # Enough steps that the request comes in the middle; the schedule is that of the long run.
    config["run"] |= {"steps": 20_000, "save_every": 20_000}
    process = subprocess.Popen(
        command(config, tmp_path), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    deadline = time.monotonic() + DEADLINE_S
    while len(read_metrics(run_dir / "metrics.jsonl", "train")) < steps and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 75, output
    stopped_at = max(losses(run_dir))
    assert f"stopped at step {stopped_at} of 20000" in output
    # What a person asked for is no error.
    assert "error" not in output
    assert list((run_dir / "errors").glob("*")) == []
    assert [folder.name for folder in commit.published(run_dir / "checkpoints")] == [f"step-{stopped_at:08d}"]
    config["run"] |= {"steps": stopped_at + 2, "allow_change": ["run.steps"]}
    done = run(command(config, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resume  step {stopped_at} " in done.stdout
    assert sorted(losses(run_dir)) == list(range(1, stopped_at + 3))


def flip_bit(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def truncate(path: Path, length: int = 1) -> None:
    path.write_bytes(path.read_bytes()[:-length])


def rewrite(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "flipped bit": (lambda newest: flip_bit(newest / "rank-00001.safetensors", -5), "rank-00001.safetensors"),
    "truncated file": (lambda newest: truncate(newest / "rank-00000.safetensors"), "rank-00000.safetensors"),
    "missing file": (lambda newest: (newest / "rank-00001.safetensors").unlink(), "rank-00001.safetensors"),
    "torn manifest": (lambda newest: truncate(newest / "manifest.json", 20), "manifest.json cannot be read"),
    "changed manifest": (
        lambda newest: rewrite(newest / "manifest.json", b'"position": 192', b'"position": 193'),
        "does not match its own SHA-256",
    ),
    "missing manifest": (lambda newest: (newest / "manifest.json").unlink(), "manifest.json cannot be read"),
    "another run's": (
        lambda newest: shutil.copytree(
            commit.published(newest.parents[2] / "calm" / "checkpoints")[0], newest, dirs_exist_ok=True
        ),
        "its manifest is of another run",
    ),
}


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(
    calm: dict[int, float], topics_data: Path, tmp_path: Path
) -> None:
    whole = [scenario(topics_data, tmp_path / name, **COMMON) for name in ("run", "calm")]
    train_scenarios(tmp_path, whole, num_ranks=2)
    for name, (damage, _) in DAMAGE.items():
        shutil.copytree(tmp_path / "run", tmp_path / name)
        damage(commit.published(tmp_path / name / "checkpoints")[0])
    train_scenarios(tmp_path, [scenario(topics_data, tmp_path / name, **COMMON) for name in DAMAGE], num_ranks=2)
    for name, (_, problem) in DAMAGE.items():
        aside = [folder.name for folder in (tmp_path / name / "checkpoints").glob(".bad-*")]
        assert aside == [".bad-step-00000006-0"], name
        assert losses(tmp_path / name) == calm
        # The log is not the only place that tells.
        told = read_run(RunDir(tmp_path / name))
        (bad,) = told.status.set_aside
        assert (bad["name"], bad["step"]) == ("step-00000006", 6)
        assert problem in bad["problem"]
        assert (6.0, f"step-00000006 set aside: {bad['problem']}") in told.marks
        assert f"set aside   step-00000006: {bad['problem']}" in told.status.lines()


def test_bad_input_is_named_by_every_rank_alike_and_leaves_the_run_folder_usable(
    topics_data: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(topics_data, damaged)
    flip_bit(damaged / "pairs" / "train" / "s-000000.tar", 700)
    other = tmp_path / "other"
    shutil.copytree(topics_data / "tokenizer", other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text.replace('"##ing"', '"##qqq"'))
    file_in_the_way = tmp_path / "file"
    file_in_the_way.write_text("not a folder")
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    (strangers / "thesis.txt").write_text("precious")
    good = scenario(topics_data, tmp_path / "good", **COMMON)
    cases: list[tuple[dict[str, Any], int, str]] = [
        (good, 0, ""),
        (scenario(topics_data, tmp_path / "good", **COMMON, optim__lr=1e-3), 2, "optim.lr: 0.002 -> 0.001"),
        (scenario(topics_data, strangers), 2, "is not empty and is not a run folder"),
        (scenario(topics_data, file_in_the_way), 2, "is not empty and is not a run folder"),
        (scenario(damaged, tmp_path / "a"), 3, "s-000000.tar"),
        (scenario(topics_data, tmp_path / "b", data__tokenizer=str(other)), 3, "another tokenizer"),
        (scenario(topics_data, tmp_path / "c", data__tokenizer=str(tmp_path / "none")), 3, str(tmp_path / "none")),
        (scenario(topics_data, tmp_path / "d", batch__global=10**7), 3, "smaller than one global batch"),
        (scenario(topics_data, tmp_path / "e", batch={"global": 1, "micro": 1}), 2, "cannot feed 2 ranks"),
        (scenario(topics_data, tmp_path / "f", task={"name": "classification"}), 3, "kind `classification`"),
        (scenario(topics_data, tmp_path / "g", data__train=str(tmp_path / "none")), 3, "not a data set"),
        (good, 0, ""),
    ]
    outcomes = attempt_scenarios(tmp_path, [config for config, _, _ in cases], num_ranks=2)
    for outcome, (_, exit_code, words) in zip(outcomes, cases, strict=True):
        assert outcome["exit_code"] == exit_code, outcome
        assert words in outcome["message"]
        assert len(outcome["message"].splitlines()) <= 8
    # Refused before anything was touched.
    assert (strangers / "thesis.txt").read_text() == "precious"
    assert [entry.name for entry in strangers.iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "d").exists()
