"""Runs on two real ranks in which something goes wrong that the run itself can mend."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from dist_lm.checkpoint import commit
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.status import status_of
from tests.data.s3_server import BUCKET, s3_serving
from tests.rank_scenarios import attempt_scenarios, losses, scenario

STAGES = range(4)


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(run / "metrics.jsonl", "event") if event.get("event") == name]


@pytest.fixture(scope="module")
def runs(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Any]]]:
    """All runs of this module in one process group, and how each ended."""
    root = tmp_path_factory.mktemp("faults")
    poison = {"fault": "nan@rank1:step5:in_loss", "run__bad_steps": 1, "zero": 2, "batch__micro": 16}
    always = {"fault": "nan@rank0:step*:in_loss:always", "run__bad_steps": 2}
    plan: dict[str, dict[str, Any]] = {
        **{f"skip{stage}": {"fault": "nan@rank1:step3:in_loss", "zero": stage} for stage in STAGES},
        "skip-bf16": {"fault": "nan@rank1:step3:in_loss", "zero": 1, "precision": "bf16"},
        "back": poison,
        "back-late": {**poison, "run__log_every": 100},
        "hopeless": always,
        "often": {**always, "fault": "nan@rank0:step5:in_loss:always", "run__bad_steps": 1},
        "early": {
            "run__eval_every": 1,
            "run__keep": 1,
            "run__best": {},
            "run__early_stop": {"patience": 2, "min_delta": 100.0},
        },
        "metric": {"run__best": {"metric": "f1"}, "run__eval_every": 2},
        "full": {"fault": "full@rank1:step3:before_write:always", "run__save_retries": 0},
        "full-last": {"fault": "full@rank1:step6:before_write:always", "run__save_retries": 0},
        "full-once": {"fault": "full@rank1:step3:before_write", "run__save_retries": 1},
        "nowhere": {"run__checkpoints": "/proc/none/checkpoints", "run__save_retries": 0},
        "oom": {"fault": "oom@rank*:step2:in_forward"},
        "oom-auto": {"fault": "oom@rank*:step2:in_forward", "batch__micro": "auto"},
        "bucket": {"run__checkpoints": f"s3://{BUCKET}/run"},
        "calm": {},
    }
    configs = [scenario(topics_data, root / name, **changes) for name, changes in plan.items()]
    with s3_serving():
        outcomes = attempt_scenarios(root, configs, num_ranks=2)
        # The same run on one rank more steps later: what two ranks saved is all that it has.
        longer = {**plan["bucket"], "run__steps": 8, "run__allow_change": ["run.steps"]}
        attempt_scenarios(root / "one", [scenario(topics_data, root / "bucket", **longer)], num_ranks=1)
    ended = dict(zip(plan, outcomes, strict=True))
    # As a crash right after the rollback would have left it; the same command goes on without the fault.
    shutil.copytree(root / "back", root / "again")
    for folder in (root / "again" / "checkpoints").iterdir():
        if folder.name != "step-00000003":
            shutil.rmtree(folder)
    del poison["fault"]
    again = {
        "again": scenario(topics_data, root / "again", **poison),
        "oom-auto": scenario(topics_data, root / "oom-auto", batch__micro="auto"),
        "early": scenario(topics_data, root / "early", **plan["early"]),
    }
    (root / "second").mkdir()
    for name, outcome in zip(again, attempt_scenarios(root / "second", [*again.values()], num_ranks=2), strict=True):
        ended[f"{name}, second"] = outcome
    return root, ended


@pytest.mark.parametrize("name", [*(f"skip{stage}" for stage in STAGES), "skip-bf16"])
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(runs: Any, name: str) -> None:
    root, ended = runs
    assert ended[name]["exit_code"] == 0, ended[name]
    assert [event["step"] for event in events(root / name, "step_skipped")] == [3]
    assert sorted(losses(root / name)) == [1, 2, 4, 5, 6]
    checkpoint = Checkpoint.load(commit.published(root / name / "checkpoints")[0])
    assert (checkpoint.progress.step, checkpoint.progress.optimizer["step"]) == (6, 5)
    reference = losses(root / "skip0")
    if name != "skip-bf16":
        assert [*losses(root / name).values()] == pytest.approx([*reference.values()], rel=1e-5)


def test_the_run_goes_back_skips_the_data_and_says_so(runs: Any) -> None:
    root, ended = runs
    assert ended["back"]["exit_code"] == 0, ended["back"]
    (record,) = RunDir(root / "back").read_list("rollbacks")
    assert (record["from_step"], record["begin"], record["end"]) == (3, 3 * 32, 5 * 32)
    (event,) = events(root / "back", "rolled_back")
    assert (event["bad_step"], event["step"]) == (5, 3)
    assert sorted(losses(root / "back")) == list(range(1, 7))
    newest = Checkpoint.load(commit.published(root / "back" / "checkpoints")[0])
    assert newest.progress.position == (6 + 2) * 32
    # Steps before the rollback are those of the calm run, those after it see other rows.
    calm, back = losses(root / "calm"), losses(root / "back")
    assert [back[step] for step in (1, 2, 3)] == pytest.approx([calm[step] for step in (1, 2, 3)], rel=1e-5)
    assert back[4] != pytest.approx(calm[4], rel=1e-5)


def test_a_bad_step_that_is_read_late_is_the_same_step(runs: Any) -> None:
    root, ended = runs
    assert ended["back-late"]["exit_code"] == 0, ended["back-late"]
    for name in ("step_skipped", "rolled_back"):
        soon, late = events(root / "back", name), events(root / "back-late", name)
        assert [_without_time(event) for event in late] == [_without_time(event) for event in soon]
    (record,) = RunDir(root / "back-late").read_list("rollbacks")
    assert (record["from_step"], record["begin"], record["end"]) == (3, 3 * 32, 5 * 32)
    soon, late = (commit.published(root / name / "checkpoints")[0] for name in ("back", "back-late"))
    assert _hashes(late) == _hashes(soon)


def _without_time(event: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in event.items() if name != "time"}


def _hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_a_resumed_run_skips_the_same_data_again(runs: Any) -> None:
    root, ended = runs
    assert ended["again, second"]["exit_code"] == 0, ended["again, second"]
    assert losses(root / "again") == losses(root / "back")


def test_a_run_without_a_way_back_ends_with_exit_code_7(runs: Any) -> None:
    _, ended = runs
    assert ended["hopeless"]["exit_code"] == 7
    assert "There is no checkpoint from before" in ended["hopeless"]["message"]
    assert ended["often"]["exit_code"] == 7
    assert "2 times already" in ended["often"]["message"]


def test_early_stopping_ends_the_run_and_the_best_checkpoint_is_kept(runs: Any) -> None:
    root, ended = runs
    assert ended["early"]["exit_code"] == 0, ended["early"]
    assert max(losses(root / "early")) == 3
    folders = [folder.name for folder in commit.published(root / "early" / "checkpoints")]
    pointer = json.loads((root / "early" / "checkpoints" / "BEST.json").read_text())
    best = min(read_metrics(root / "early" / "metrics.jsonl", "eval"), key=lambda record: record["loss"])
    assert pointer == {"step": best["step"], "metric": "loss", "value": best["loss"]}
    assert sorted({f"step-{best['step']:08d}", "step-00000003"}, reverse=True) == folders
    # The same command finds nothing left to do.
    assert ended["early, second"]["exit_code"] == 0
    assert max(losses(root / "early")) == 3


def test_an_unknown_figure_is_a_configuration_error(runs: Any) -> None:
    _, ended = runs
    assert ended["metric"]["exit_code"] == 2
    assert "no figure `f1`" in ended["metric"]["message"]


@pytest.mark.parametrize(("name", "saved"), [("full", []), ("full-last", ["step-00000003"])])
def test_a_full_disk_of_one_rank_ends_all_and_publishes_nothing(runs: Any, name: str, saved: list[str]) -> None:
    root, ended = runs
    assert ended[name]["exit_code"] == 4
    assert "No space left on device" in ended[name]["message"]
    assert [folder.name for folder in commit.published(root / name / "checkpoints")] == saved


def test_a_disk_that_was_full_for_a_while_costs_nothing(runs: Any) -> None:
    root, ended = runs
    assert ended["full-once"]["exit_code"] == 0
    assert losses(root / "full-once") == losses(root / "calm")
    assert [folder.name for folder in commit.published(root / "full-once" / "checkpoints")] == [
        "step-00000006",
        "step-00000003",
    ]


def test_a_place_that_cannot_be_written_is_named(runs: Any) -> None:
    _, ended = runs
    assert ended["nowhere"]["exit_code"] == 4
    assert "/proc/none/checkpoints" in ended["nowhere"]["message"]


def test_a_run_with_checkpoints_in_object_storage_goes_on_from_there(runs: Any) -> None:
    root, ended = runs
    assert ended["bucket"]["exit_code"] == 0, ended["bucket"]
    assert not commit.published(root / "bucket" / "checkpoints")
    assert RunDir(root / "bucket").attempt_facts(2)["from_step"] == 6
    assert sorted(losses(root / "bucket")) == list(range(1, 9))


def test_out_of_memory_tells_numbers_and_options(runs: Any) -> None:
    _, ended = runs
    assert ended["oom"]["exit_code"] == 5
    for words in ("micro-batch of 16 rows", "ZeRO-0, fp32, cpu", "Set batch.micro to 8", "bf16"):
        assert words in ended["oom"]["message"]


def test_an_automatic_micro_batch_is_halved_and_the_global_batch_stays(runs: Any) -> None:
    root, ended = runs
    assert ended["oom-auto"]["exit_code"] == 5
    assert "The next attempt takes 8 rows" in ended["oom-auto"]["message"]
    assert ended["oom-auto, second"]["exit_code"] == 0, ended["oom-auto, second"]
    settings = json.loads((root / "oom-auto" / "ds_config.json").read_text())
    assert (settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]) == (8, 2)
    assert [*losses(root / "oom-auto").values()] == pytest.approx([*losses(root / "calm").values()], rel=1e-5)


def test_the_status_tells_what_happened(runs: Any) -> None:
    root, _ = runs
    calm = status_of(RunDir(root / "calm"))
    assert (calm.state, calm.step, calm.steps, calm.faults, calm.lost_steps) == ("done", 6, 6, 0, 0)
    assert 0.0 < calm.goodput <= 1.0
    assert calm.checkpoint is not None
    assert (calm.checkpoint["step"], calm.checkpoint["verification"]) == (6, "verified")
    retried = status_of(RunDir(root / "oom-auto"))
    assert [facts["reason"] for facts in retried.attempts] == ["memory", "done"]
    assert (retried.faults, retried.state) == (1, "done")
    back = status_of(RunDir(root / "back"))
    assert back.rollbacks == 1
    assert json.loads(json.dumps(back.as_json()))["rollbacks"] == 1
