"""What faults cost: stall of a save, bytes, load at another world size, restart, goodput.

Enters: this machine's CPU.  Leaves: JSON with ratios measured side by side in one run.

    python bench/checkpoints.py --out bench/results/checkpoints.json
    python bench/checkpoints.py --minutes 5      how long the run that is killed once a minute lasts

stall_vs_deepspeed     time that the loop waits for a save, ours / DeepSpeed's save_checkpoint, same state
bytes_vs_state         bytes on disk / fp32 weights and two moments
load_vs_universal      load of two ranks' checkpoint on one rank, ours / ds_to_universal + load
restart_s              SIGKILL of a rank to the first step after it, by phase
goodput_1_per_min      share of the time in steps that counted, under one kill a minute
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.recorded import REPOSITORY, taken_on

SIZE = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "intermediate_size": 1536}
REPEATS = 5


def engine_on(ranks: Any, universal: bool = False) -> Any:
    """A BERT of about 12 M parameters under ZeRO-2 with the optimizer's state in place."""
    import torch
    from transformers import BertConfig, BertForPreTraining

    from dist_lm.checkpoint.fragments import _base_optimizer, _create_state
    from dist_lm.config import OptimSection
    from dist_lm.engine import Engine

    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(vocab_size=8000, **SIZE))
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "steps_per_print": 10**9,
    }
    if universal:
        settings["checkpoint"] = {"load_universal": True}

    class NoTask:
        def loss_sums(self, model: Any, inputs: Any) -> dict[str, Any]:
            raise NotImplementedError

    engine = Engine(
        model,
        NoTask(),  # type: ignore[arg-type]
        optim=OptimSection(lr=1e-4),
        deepspeed_settings=settings,
        ranks=ranks,
        seed=0,
    )
    optimizer = _base_optimizer(engine)
    _create_state(optimizer, [p for group in optimizer.param_groups for p in group["params"]])
    return engine


def rank_main(mode: str, folder: Path) -> None:
    """One rank of `save` (two ranks) or `load` (one rank)."""
    from dist_lm.worker import prepare_environment

    prepare_environment()
    from dist_lm.ranks import Ranks, disconnect

    ranks = Ranks.connect()
    figures = save_figures(ranks, folder) if mode == "save" else load_figures(ranks, folder)
    if ranks.is_first:
        (folder / f"{mode}.json").write_text(json.dumps(figures))
    ranks.barrier()
    disconnect()


def save_figures(ranks: Any, folder: Path) -> dict[str, float]:
    from dist_lm.checkpoint.commit import Retention
    from dist_lm.checkpoint.fragments import own_fragments
    from dist_lm.checkpoint.manifest import Checkpoint, Progress
    from dist_lm.checkpoint.store import LocalStore, step_name
    from dist_lm.checkpoint.writer import Writer

    engine = engine_on(ranks)
    store = LocalStore(folder / "ours")
    writer = Writer(store, ranks, run_id="bench", attempt=1, retention=Retention(2))
    ours, theirs, whole = [], [], []
    for number in range(1, REPEATS + 1):
        progress = Progress(step=number, position=0, data_fingerprint="", optimizer={"step": 1.0})
        ranks.barrier()
        began = time.perf_counter()
        writer.start(progress, lambda: own_fragments(engine))
        ours.append(max(ranks.gather(time.perf_counter() - began)))
        writer.finish()
        whole.append(time.perf_counter() - began)
        ranks.barrier()
        began = time.perf_counter()
        engine.deepspeed_engine.save_checkpoint(str(folder / "theirs"), tag=f"global_step{number}")
        theirs.append(max(ranks.gather(time.perf_counter() - began)))
    num_parameters = sum(parameter.numel() for parameter in engine.module.parameters())
    checkpoint = Checkpoint.read(store, step_name(REPEATS))
    on_disk = sum(path.stat().st_size for path in (folder / "ours" / step_name(REPEATS)).iterdir())
    assert not checkpoint.damage(checkpoint.files)
    return {
        "parameters": num_parameters,
        # The first one allocates the buffer; a run pays that once.
        "first_stall_s": ours[0],
        "stall_s": median(ours[1:]),
        "deepspeed_stall_s": median(theirs[1:]),
        "until_published_s": median(whole[1:]),
        "bytes": on_disk,
        "state_bytes": num_parameters * 12,
    }


def load_figures(ranks: Any, folder: Path) -> dict[str, float]:
    from dist_lm.checkpoint.commit import newest_verified
    from dist_lm.checkpoint.fragments import restore
    from dist_lm.checkpoint.reader import Reader
    from dist_lm.checkpoint.store import LocalStore

    ours = engine_on(ranks)
    began = time.perf_counter()
    checkpoint = newest_verified(LocalStore(folder / "ours"), ranks, "bench")
    assert checkpoint is not None
    restore(ours, Reader(checkpoint), checkpoint.progress.optimizer)
    ours_s = time.perf_counter() - began
    theirs = engine_on(ranks, universal=True)
    began = time.perf_counter()
    # A process of its own, as DeepSpeed's manual has it; its imports are not counted.
    source, target = folder / "theirs" / f"global_step{REPEATS}", folder / "theirs" / "universal"
    from argparse import Namespace

    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    from deepspeed.checkpoint import ds_to_universal

    convert_s = -time.perf_counter()
    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(target),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )
    convert_s += time.perf_counter()
    began = time.perf_counter()
    theirs.deepspeed_engine.load_checkpoint(str(folder / "theirs"), tag="universal")
    return {"load_s": ours_s, "convert_s": convert_s, "universal_load_s": time.perf_counter() - began}


def start_ranks(mode: str, count: int, folder: Path) -> dict[str, float]:
    from dist_lm.cluster.local import free_port

    environment = {
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", mode, "--folder", str(folder)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=sys.stderr,
        )
        for rank in range(count)
    ]
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        raise SystemExit(f"a rank of `{mode}` failed: {codes}")
    figures: dict[str, float] = json.loads((folder / f"{mode}.json").read_text())
    return figures


def started_at(pid: int) -> float:
    """Wall-clock time of a process's start."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime_s + ticks / os.sysconf("SC_CLK_TCK")


class Folders:
    """What the tests' data are made with, outside pytest."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def mktemp(self, name: str) -> Path:
        (self._root / name).mkdir()
        return self._root / name


def killed_run(folder: Path, minutes: float) -> dict[str, Any]:
    """Train the demo's model under one SIGKILL a minute; seconds from a kill to the next step, and goodput."""
    from dist_lm.metrics import read_metrics
    from dist_lm.run_dir import RunDir
    from dist_lm.status import status_of
    from tests.conftest import topics_data
    from tests.gloo_ranks import environment, write_recipe

    data = topics_data.__wrapped__(Folders(folder))  # type: ignore[attr-defined]
    # As launch/recipes/demo-pretrain.yaml; one record a step, by which the first one after a kill is seen.
    model = {"size": "tiny", "overrides": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}}
    options = {"model": model, "batch__micro": 16, "zero": 2, "deepspeed": str(REPOSITORY / "ds_configs/cpu_gloo.json")}
    recipe = write_recipe(
        folder / "recipe.yaml", data, run__steps=10**6, run__save_every="2s", run__log_every=1, **options
    )
    run_dir = RunDir(folder / "run")
    words = [sys.executable, "-m", "dist_lm", "train", "-c", str(recipe), "--cpu", "2", "--max-restarts", "99"]
    process = subprocess.Popen(words, env=environment(), cwd=REPOSITORY, stdout=subprocess.DEVNULL)
    ends_at, restarts = time.monotonic() + minutes * 60, []

    def await_step(after: float) -> float:
        while True:
            records = read_metrics(run_dir.metrics, "train")
            if records and records[-1]["time"] > after:
                return float(next(record["time"] for record in records if record["time"] > after))
            time.sleep(0.1)

    await_step(0.0)
    while (left_s := ends_at - time.monotonic()) > 0:
        time.sleep(max(0.0, min(60.0 - (restarts[-1]["total"] if restarts else 0.0), left_s)))
        attempt = run_dir.next_attempt()
        killed_at = time.time()
        os.kill(run_dir.attempt_facts(attempt - 1)["pids"][1], signal.SIGKILL)
        while run_dir.next_attempt() == attempt or "resumed_at" not in run_dir.attempt_facts(attempt):
            time.sleep(0.05)
        facts = run_dir.attempt_facts(attempt)
        began_at = max(started_at(pid) for pid in facts["pids"])
        stepped_at = await_step(facts["began_at"])
        restarts.append(
            {
                "total": stepped_at - killed_at,
                "until_ranks_started": began_at - killed_at,
                "connect_inputs_and_model": facts["began_at"] - began_at,
                "engine_and_load": facts["resumed_at"] - facts["began_at"],
                "first_step": stepped_at - facts["resumed_at"],
            }
        )
    process.send_signal(signal.SIGTERM)
    process.wait()
    found = status_of(run_dir)
    return {
        "kills": len(restarts),
        "restart_s": {phase: round(median(one[phase] for one in restarts), 3) for phase in restarts[0]},
        "goodput_1_per_min": found.goodput,
        "lost_steps": found.lost_steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--rank", choices=["save", "load"])
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.rank:
        rank_main(given.rank, given.folder)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved, loaded = start_ranks("save", 2, folder), start_ranks("load", 1, folder)
        killed = killed_run(folder, given.minutes)
    figures = {
        **taken_on(),
        "stall_vs_deepspeed": saved["stall_s"] / saved["deepspeed_stall_s"],
        "bytes_vs_state": saved["bytes"] / saved["state_bytes"],
        "load_vs_universal": loaded["load_s"] / (loaded["convert_s"] + loaded["universal_load_s"]),
        **killed,
        "seconds": {**saved, **loaded},
    }
    text = json.dumps(figures, indent=1)
    print(text)
    if given.out:
        given.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
