"""After a fault the state comes from the machines themselves: a real S3 server counts what is fetched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dist_lm.errors import EXIT_CRASH
from dist_lm.faults import VARIABLE
from dist_lm.run_dir import RunDir
from dist_lm.status import status_of
from tests.data.s3_server import BUCKET, S3Fault, s3_serving
from tests.rank_scenarios import attempt_scenarios, launch_here, losses, scenario

COMMON: dict[str, Any] = {"zero": 2, "batch__micro": 16, "optim__schedule": {"kind": "constant"}}
LONGER = {"run__steps": 8, "run__allow_change": ["run.steps"]}
FILES = [f"rank-0000{rank}.safetensors" for rank in range(2)]


def changes(root: Path, name: str, copies: str) -> dict[str, Any]:
    return {**COMMON, "run__checkpoints": f"s3://{BUCKET}/{name}", "run__local_copies": str(root / copies)}


def copies_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*/step-*"))


@pytest.fixture(scope="module")
def runs(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Runs on two ranks that begin, lose something, and go on."""
    root = tmp_path_factory.mktemp("nearest")
    plan = {
        # Variables of a machine are what tells two machines apart on this one.
        "moved": changes(root, "moved", "machine-$RANK"),
        "damaged": changes(root, "damaged", "damaged-copies"),
    }
    found: dict[str, Any] = {}
    with s3_serving() as server:
        begun = [scenario(topics_data, root / name, **of_run) for name, of_run in plan.items()]
        calm = scenario(topics_data, root / "calm", **COMMON, run__steps=8)
        found["begun"] = attempt_scenarios(root / "first", [calm, *begun], num_ranks=2)
        found["machine-0"] = copies_in(root / "machine-0")
        shutil.rmtree(root / "machine-1")
        (copy,) = (root / "damaged-copies").glob("*/step-00000006-rank-00001.safetensors")
        content = bytearray(copy.read_bytes())
        content[-5] ^= 1
        copy.write_bytes(bytes(content))
        # Whoever fetches what step 6 has written gets no answer, but for the file whose copy is damaged.
        server.faults = [S3Fault("slow_down", f"/moved/step-00000006/0001-0002/{file}", 10**6) for file in FILES]
        server.faults.append(S3Fault("slow_down", f"/damaged/step-00000006/0001-0002/{FILES[0]}", 10**6))
        again = [scenario(topics_data, root / name, **of_run, **LONGER) for name, of_run in plan.items()]
        server.gets.clear()
        found["again"] = attempt_scenarios(root / "second", again, num_ranks=2)
        found["fired"] = server.fired.total()
        found["damaged gets"] = server.gets[FILES[1]]
        found["machine-1"] = copies_in(root / "machine-1")
        server.gets.clear()
        recipe = root / "recipe.yaml"
        of_killed = changes(root, "killed", "killed-copies")
        recipe.write_text(json.dumps(scenario(topics_data, root / "killed", **of_killed, run__steps=8)))
        with pytest.MonkeyPatch.context() as patched:
            # The save before was published: this one waits for it.
            patched.setenv(VARIABLE, "kill@rank0:step6:after_snapshot")
            found["killed"] = launch_here(recipe, root / "killed", meanwhile=lambda: None)
        found["restarted"] = launch_here(recipe, root / "killed", meanwhile=lambda: None)
        found["gets"] = {file: server.gets[file] for file in [*FILES, "manifest.json"]}
        # This verifies the newest one, by all that the store holds.
        found["reasons"] = [facts["reason"] for facts in status_of(RunDir(root / "killed")).attempts]
    return root, found


def test_after_sigkill_no_fragment_is_fetched_and_the_losses_are_the_same(runs: Any) -> None:
    root, found = runs
    assert (found["killed"], found["restarted"]) == (EXIT_CRASH, 0)
    assert found["reasons"] == ["died", "done"]
    assert RunDir(root / "killed").attempt_facts(2)["from_step"] == 3
    assert found["gets"].pop("manifest.json") > 0, "the store is the truth"
    assert found["gets"] == dict.fromkeys(FILES, 0)
    assert losses(root / "killed") == losses(root / "calm")


def test_a_machine_that_lost_its_disk_gets_its_file_from_its_neighbour(runs: Any) -> None:
    root, found = runs
    assert [one["message"] for one in found["begun"] + found["again"]] == [""] * 5
    assert {f"step-00000006-{file}" for file in FILES} <= {*found["machine-0"]}
    assert found["fired"] == 0, "a file was asked for that is nearby"
    assert RunDir(root / "moved").attempt_facts(2)["from_step"] == 6
    assert "step-00000006-rank-00001.safetensors" in found["machine-1"]
    assert losses(root / "moved") == losses(root / "calm")


def test_a_damaged_copy_is_told_and_the_store_is_read_instead(runs: Any) -> None:
    root, found = runs
    assert found["damaged gets"] > 0
    log = (root / "damaged" / "logs" / "rank-00001.log").read_text()
    assert log.count("step-00000006-rank-00001.safetensors is damaged, its checkpoint's store is read instead") == 1
    assert RunDir(root / "damaged").attempt_facts(2)["from_step"] == 6
    assert losses(root / "damaged") == losses(root / "calm")
