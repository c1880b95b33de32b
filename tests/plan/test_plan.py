"""`dist-lm plan`: what it prints of a configuration, what it advises, and how near a real run comes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.turns import send, with_descendants
from dist_lm.cli import main
from dist_lm.deepspeed_config import load_run
from dist_lm.plan.machine import machine_of
from dist_lm.plan.plan import Machine, Options, Plan, make_plan
from dist_lm.plan.probe import with_rate

TIMEOUT_S = 120

RECIPE = """
task: {{name: mlm}}
model: {{size: tiny}}
data: {{train: {data}/pairs/train, tokenizer: {data}/tokenizer, lanes: 2, era: 64}}
batch: {{global: 16, micro: 8}}
optim: {{lr: 1e-3}}
run: {{dir: {run}, steps: 1000}}
"""
# 1.5 B parameters: 30 GB of states on one device.
LARGE = ["model.overrides={num_hidden_layers: 3, hidden_size: 6400, num_attention_heads: 50, intermediate_size: 25600}"]

# 9 B parameters: 19 GB of weights.
HUGE = "model.overrides={num_hidden_layers: 5, hidden_size: 12800, num_attention_heads: 100, intermediate_size: 51200}"


@pytest.fixture
def recipe(topics_data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(data=topics_data, run=tmp_path / "run"))
    return path


def plan(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dist_lm", "plan", "-c", str(recipe), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_plan_for_a_cluster_holds_together(recipe: Path) -> None:
    options = ("--gpus", "8", "--gpu", "h100", "--price", "2", "--simulate-faults", "precision=bf16")
    done = plan(recipe, "--json", *options)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    run, stages = found["run"], found["stages"]
    assert found["ranks"] == 8
    assert [stage["stage"] for stage in stages] == [0, 1, 2, 3]
    assert found["configured"] == found["chosen"] == 1
    assert run["cost"] == pytest.approx(2 * run["device_hours"])
    assert run["device_hours"] == pytest.approx(24 * 8 * run["days"])
    assert run["tokens_s"] * run["step_s"] == pytest.approx(found["tokens_a_step"])
    assert run["checkpoint_gb"] == pytest.approx(found["parameters"] * 12 / 1e9)
    assert 0.9 < run["goodput_worst_of_20"] <= run["goodput_simulated"] <= 1
    assert not (recipe.parent / "run").exists()


def test_a_run_that_does_not_fit_is_told_what_would(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = for_l4(recipe, 1, "precision=bf16", "model.attention=sdpa", *LARGE)
    assert large.chosen == -1
    assert any("zero3_offload" in advice for advice in large.advice)
    shared = for_l4(recipe, 16, "precision=bf16", "zero=0", *LARGE)
    assert shared.advice == [f"zero={shared.chosen}"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", "-c", str(recipe), "--gpu", "t4", "precision=fp16", HUGE])
    errors = capsys.readouterr().err
    assert ended.value.code == 2
    assert "the model fits by no option" in errors
    assert re.search(r"needs [\d.]+ GiB a rank: [\d.]+ GiB more than 90% of the 15.0 GiB that are there", errors)


def for_l4(recipe: Path, gpus: int, *overrides: str) -> Plan:
    config = load_run(recipe, list(overrides)).config
    return make_plan(config, machine_of("l4", gpus, config.precision), Options())


def test_wrong_options_are_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, told in (
        (["--gpu", "h1000"], "there is no accelerator `h1000`"),
        (["--gpu", "v100", "precision=bf16"], "v100 has no bf16"),
        (["--mfu", "40"], "--mfu 40.0 is not a share"),
        (["--probe", "2"], "--probe 2 steps are too few"),
        (["--probe", "6", "--gpu", "h100"], "--probe runs on CPU ranks"),
    ):
        # In this process, which has imported torch: nothing is traced before these are refused.
        with pytest.raises(SystemExit) as ended:
            main(["plan", "-c", str(recipe), *arguments])
        errors = capsys.readouterr().err
        assert (ended.value.code, told in errors) == (2, True), errors


def test_what_does_not_grow_with_the_rows_is_foretold_as_it_was_measured(recipe: Path) -> None:
    def plan_of(rows: int, machine: Machine) -> Plan:
        config = load_run(recipe, [f"batch.global={rows}", f"batch.micro={rows}"]).config
        return make_plan(config, machine, Options(mfu=1.0))

    machine = machine_of("l4", 1, "fp32")
    work = plan_of(4, machine)
    rated = with_rate(machine, work, 1.0, 0.25)
    assert plan_of(4, rated).run["step_s"] == pytest.approx(1.0)
    twice = plan_of(8, rated)
    assert twice.run["step_s"] == pytest.approx(0.25 + 0.75 * twice.flops_a_step / work.flops_a_step)


def test_a_probe_sets_real_steps_beside_the_plan(recipe: Path) -> None:
    done = plan(recipe, "--gpus", "1", "--probe", "4")
    assert done.returncode == 0, done.stderr
    (memory,) = [line.split() for line in done.stdout.splitlines() if line.startswith("memory, GiB")]
    planned_gib, measured_gib, ratio = map(float, memory[-3:])
    assert planned_gib == pytest.approx(measured_gib, rel=0.1)
    assert ratio == pytest.approx(planned_gib / measured_gib, abs=0.01)
    assert not (recipe.parent / "run").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_probe_leaves_nothing_behind(recipe: Path, tmp_path: Path, number: int) -> None:
    # Too long for the name of a socket.
    temporary = tmp_path / ("t" * 100)
    temporary.mkdir()
    environment = {**os.environ, "TMPDIR": str(temporary)}
    command = [sys.executable, "-m", "dist_lm", "plan", "-c", str(recipe), "--gpus", "1", "--probe", "1000000"]
    probing = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        # It trains.
        while not [*temporary.glob("dist_lm-probe-*/run/metrics.jsonl")]:
            assert probing.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        probing.send_signal(number)
        assert probing.wait(TIMEOUT_S) != 0
    finally:
        send(with_descendants(probing.pid), signal.SIGKILL)
        probing.wait()
    assert not [*temporary.glob("dist_lm-probe-*")]
