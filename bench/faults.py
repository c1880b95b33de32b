"""Every kind of fault, one after another: when the next step came, and whether all is as without it.

Enters: this machine's CPU, two ranks of a small BERT.  Leaves: a table, and JSON.

    python bench/faults.py --out bench/results/faults.md
    python bench/faults.py --minutes 12      random kills for that long; 0: none

next_step_s      from the fault to the first step after it; where the command had to be given again, its start
                 and imports are in it
lost_steps       trained a second time
difference       largest relative difference of a step's loss from the calm run
samples_differ   samples that were lost or seen twice
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.checkpoints import Folders
from bench.recorded import record
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir
from dist_lm.sample_log import VARIABLE, samples_by_step
from dist_lm.status import status_of
from tests.conftest import topics_data
from tests.faults.random_kills import CHANGING, SAME, soaked
from tests.gloo_ranks import REPOSITORY, environment, losses, write_recipe

STEPS, ASK_AFTER = 60, 5
SETTINGS: dict[str, Any] = {"zero": 2, "batch__micro": 8, "run__steps": STEPS, "run__save_every": 5}
HEAD = ("fault", "exit codes", "next_step_s", "lost_steps", "difference", "samples_differ")
Ask = Callable[[psutil.Process, RunDir], None]


@dataclass(frozen=True)
class Fault:
    """A fault that the code arms for itself, or one that is done to a process from outside."""

    name: str
    armed: str = ""
    ask: Ask | None = None
    then: Callable[[RunDir], None] | None = None
    """What happens to the run folder before the command is given again."""
    settings: dict[str, Any] = field(default_factory=dict)


def to_launcher(number: signal.Signals) -> Ask:
    return lambda launcher, _run: launcher.send_signal(number)


def to_rank(launcher: psutil.Process, run: RunDir) -> None:
    os.kill(run.attempt_facts(1)["pids"][1], signal.SIGTERM)


def by_command(launcher: psutil.Process, run: RunDir) -> None:
    run.stop_file.touch()


def flip_a_bit(run: RunDir) -> None:
    newest = sorted(run.checkpoints.glob("step-*"))[-1] / "rank-00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 1
    newest.write_bytes(content)


FAULTS = (
    Fault("SIGKILL of one rank, in a collective", "kill@rank1:step32:in_collective"),
    Fault("SIGKILL of all ranks", "kill@rank*:step32:before_optimizer"),
    Fault("SIGKILL of one rank, as it writes a checkpoint", "kill@rank1:step30:in_write"),
    Fault("SIGKILL of rank 0, before it publishes one", "kill@rank0:step30:before_publish"),
    Fault("SIGSTOP of one rank, stall limit 3 s", "stop@rank1:step32:in_forward", settings={"run__stall_limit_s": 3}),
    Fault("out of memory on all ranks, micro-batch auto", "oom@rank*:step32:in_forward"),
    Fault("full disk, once", "full@rank1:step30:before_write"),
    Fault("SIGTERM to the launcher, then again", ask=to_launcher(signal.SIGTERM)),
    Fault("SIGTERM to one rank, then again", ask=to_rank),
    Fault("dist-lm stop, then again", ask=by_command),
    Fault("SIGKILL of the launcher, then again", ask=to_launcher(signal.SIGKILL)),
    Fault("a bit of the newest checkpoint flips, then again", ask=by_command, then=flip_a_bit),
)


def train(recipe: Path, samples: Path, fault: Fault, run: RunDir) -> tuple[list[int], float]:
    """Train to the end, with the command given again where it ended before.  Exit codes, moment of the fault."""
    words = [sys.executable, "-m", "dist_lm", "train", "-c", str(recipe), "--cpu", "2", "--max-restarts", "1"]
    variables = environment({"DIST_LM_FAULT": fault.armed, VARIABLE: str(samples)})
    codes: list[int] = []
    happened_at = 0.0
    while not codes or (codes[-1] != 0 and len(codes) < 2):
        with (recipe.parent / "log").open("ab") as log:
            launcher = psutil.Popen(words, env=variables, cwd=REPOSITORY, stdout=log, stderr=log)
        if not codes:
            happened_at = await_fault(fault, launcher, run)
        codes.append(launcher.wait())
        ranks = run.attempt_facts(run.next_attempt() - 1)["pids"]
        while any(psutil.pid_exists(pid) for pid in ranks):
            time.sleep(0.01)
        if len(codes) == 1 and fault.then:
            fault.then(run)
    return codes, happened_at


def await_fault(fault: Fault, launcher: psutil.Popen, run: RunDir) -> float:
    """Wall-clock time at which it happens, or is made to happen; 0 where no process shows it."""
    while run.next_attempt() < 2 or not read_metrics(run.metrics, "train"):
        if launcher.poll() is not None:
            raise SystemExit(f"{fault.name}: the run ended by itself")
        time.sleep(0.01)
    if fault.ask:
        while len(read_metrics(run.metrics, "train")) < ASK_AFTER:
            time.sleep(0.01)
        fault.ask(launcher, run)
        return time.time()
    ranks = run.attempt_facts(1)["pids"]
    while launcher.poll() is None:
        if any(not is_well(pid) for pid in ranks):
            return time.time()
        time.sleep(0.005)
    return 0.0


def is_well(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def under(fault: Fault, data: Path, folder: Path, calm: Path | None) -> dict[str, Any]:
    """One run under a fault, against the calm one."""
    samples = folder / "samples"
    samples.mkdir(parents=True)
    settings = {**SETTINGS, **fault.settings}
    if fault.armed.startswith("oom"):
        settings["batch__micro"] = "auto"
    recipe, run = write_recipe(folder / "recipe.yaml", data, **settings), RunDir(folder / "run")
    codes, happened_at = train(recipe, samples, fault, run)
    if calm is None:
        return {"exit_codes": codes}
    status, found, expected = status_of(run), losses(run.path), losses(calm / "run")
    got, wanted = (Counter(itertools.chain(*samples_by_step(one).values())) for one in (samples, calm / "samples"))
    later = status.attempts[1]["resumed_at"] if len(status.attempts) > 1 else None
    stepped = [one["time"] for one in read_metrics(run.metrics, "train") if later and one["time"] > later]
    return {
        "fault": fault.name,
        "exit_codes": codes,
        "next_step_s": round(stepped[0] - happened_at, 2) if stepped else 0.0,
        "lost_steps": sum(path.read_bytes().count(b"\n") for path in samples.glob("*-rank-00000.jsonl")) - STEPS,
        "difference": max(abs(found.get(step, 0.0) - loss) / loss for step, loss in expected.items()),
        "samples_differ": (wanted - got).total() + (got - wanted).total(),
    }


def table(rows: list[dict[str, Any]], soaks: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for row in rows:
        codes = ", ".join(str(code) for code in row["exit_codes"])
        cells = (row["fault"], codes, row["next_step_s"], row["lost_steps"], f"{row['difference']:.1e}")
        lines.append("| " + " | ".join(str(cell) for cell in (*cells, row["samples_differ"])) + " |")
    if soaks:
        names = [name for name in soaks[0] if name != "attempts"]
        lines += ["", "Random kills:", "", "| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        lines += ["| " + " | ".join(str(soak[name]) for name in names) + " |" for soak in soaks]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a .md file; the JSON stands beside it")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    rows, soaks = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = topics_data.__wrapped__(Folders(folder))  # type: ignore[attr-defined]
        under(Fault("none"), data, folder / "calm", None)
        for number, fault in enumerate(FAULTS):
            rows.append(under(fault, data, folder / str(number), folder / "calm"))
            print(json.dumps(rows[-1]), flush=True)
        for worlds, most, share in (SAME, CHANGING) if given.minutes else ():
            place = folder / f"soak-{len(worlds)}"
            found = soaked(data, place, worlds, most=most, minutes=given.minutes * share, seed=given.seed)
            soaks.append(found.facts)
            print(json.dumps(soaks[-1]), flush=True)
    record("Faults", table(rows, soaks), {"faults": rows, "soaks": soaks}, given.out)


if __name__ == "__main__":
    main()
