"""Quality beside Hugging Face's Trainer: same first weights, data, steps and learning rate; three seeds.

    python bench/quality.py --out work/quality \
        --sst2 sst2.train.txt.gz sst2.test.txt.gz \
        --ner wikiann_en.train.txt.gz wikiann_en.test.txt.gz \
        --qa xquad.en.json.gz \
        --translation multi30k.train.en.gz multi30k.train.de.gz multi30k.test.en.gz multi30k.test.de.gz \
        --wikitext wikitext2.valid.txt.gz wikitext2.test.txt.gz

Give the sets that you have; `--tasks sst2 ner` takes some of them.  How it measures: a new small model
of each seed is saved once, both systems start from it, on one rank, one thread, fp32; features of
Trainer are those of the example scripts.  Both models are judged by `dist-lm eval` on the same test
records.  Two trainings run side by side, one a core: about 20 minutes for all five.  The last line is
JSON: {task: {"dist_lm": [a figure a seed], "hf": [...]}}; for WikiText the figure is perplexity, for
the others higher is better.  Figures are kept in OUT/results.json one by one; the same command goes on
where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.update(DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")

import quality_data

from dist_lm import disk
from dist_lm.data.process_pool import start_worker
from dist_lm.worker import prepare_environment


@dataclass(frozen=True)
class Plan:
    """One data set and how to learn it."""

    task: str
    kind: str
    metric: str
    tokenizer: str
    seq_len: int
    rows: int
    steps: int
    learning_rate: float
    options: dict[str, Any]
    test_records: int
    model: dict[str, Any] = field(default_factory=dict)
    """What differs from a new BERT of size tiny."""
    max_new_tokens: int = 48


# T5's own tiny size would take most of the time of all five.
SMALL_T5 = {
    "family": "t5",
    "overrides": {"d_model": 128, "d_kv": 32, "d_ff": 512, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2},
}
PLANS = {
    "sst2": Plan("classification", "classification", "accuracy", "wordpiece", 64, 32, 400, 5e-4, {}, 1821),
    "ner": Plan("token_classification", "token_classification", "entity_f1", "wordpiece", 64, 32, 600, 1e-3, {}, 2000),
    "qa": Plan(
        "question_answering", "question_answering", "f1", "wordpiece", 192, 16, 200, 5e-4, {"doc_stride": 48}, 300
    ),
    "translation": Plan("seq2seq", "seq2seq", "bleu", "t5", 48, 32, 600, 2e-3, {}, 200, SMALL_T5),
    "wikitext": Plan("causal_lm", "tokens", "perplexity", "bpe", 96, 16, 300, 2e-3, {}, 400, {"family": "gpt2"}),
}
SYSTEMS = ("dist_lm", "hf")
VOCABULARY = 6000


class Job(NamedTuple):
    """One training and its figure."""

    name: str
    seed: int
    system: str

    @property
    def key(self) -> str:
        return f"{self.name} {self.system} {self.seed}"


def prepare_data(name: str, plan: Plan, paths: list[str], folder: Path) -> None:
    """FOLDER/{train,test}.jsonl, tokenizer/ and data/."""
    from dist_lm.data.prepare import PrepareOptions, prepare
    from dist_lm.data.tokenizer import train_tokenizer

    train, test = getattr(quality_data, name)(paths)
    quality_data.write(folder / "train.jsonl", train)
    quality_data.write(folder / "test.jsonl", test[: plan.test_records])
    if not (folder / "tokenizer").exists():
        texts = quality_data.texts_of(train)
        train_tokenizer(texts, vocab_size=VOCABULARY, out=folder / "tokenizer", kind=plan.tokenizer)
    prepare(
        PrepareOptions(
            inputs=[str(folder / "train.jsonl")], out=folder / "data", tokenizer=folder / "tokenizer",
            kind=plan.kind, seq_len=plan.seq_len, heldout_fraction=0.0, kind_options=plan.options,
        )
    )  # fmt: skip


def config_of(plan: Plan, folder: Path, run: Path, seed: int, model: dict[str, Any]) -> Any:
    from dist_lm.config import RunConfig

    data: dict[str, Any] = {"train": str(folder / "data" / "train"), "tokenizer": str(folder / "tokenizer")}
    if plan.kind == "tokens":
        data["seq_len"] = plan.seq_len
    return RunConfig.model_validate(
        {
            "task": {"name": plan.task},
            "model": model,
            "data": data,
            "batch": {"global": plan.rows, "micro": plan.rows},
            "optim": {"lr": plan.learning_rate, "schedule": {"kind": "linear", "warmup_steps": plan.steps // 10}},
            "run": {"dir": str(run), "steps": plan.steps, "seed": seed, "log_every": 100, "save_every": plan.steps},
            "zero": 1,
        }
    )


def first_weights(plan: Plan, folder: Path, seed: int) -> None:
    """A new model as FOLDER/start-SEED, so that both systems begin alike."""
    from dist_lm.data.manifest import Manifest
    from dist_lm.data.tokenizer import load_tokenizer
    from dist_lm.data.views import view_of
    from dist_lm.tasks.registry import build_task

    config = config_of(plan, folder, folder / "unused", seed, {"size": "tiny", **plan.model})
    tokenizer = load_tokenizer(config.data.tokenizer)
    view = view_of(Manifest.load(config.data.train), config.data.seq_len)
    model = build_task(config.task, tokenizer, view, seed).build_model(config.model)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder / f"start-{seed}")


def train_dist_lm(plan: Plan, folder: Path, seed: int, out: Path) -> None:
    from dist_lm.cluster.local import free_port
    from dist_lm.config_files import LoadedConfig
    from dist_lm.ranks import Ranks, disconnect
    from dist_lm.stop import StopFlag
    from dist_lm.train import train

    # Not for Trainer, which would make a process group of its one rank.
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    config = config_of(plan, folder, out, seed, {"from": str(folder / f"start-{seed}")})
    ranks = Ranks.connect()
    train(LoadedConfig(config, {}), ranks, stop=StopFlag(), launcher="bench")
    disconnect()


def train_hf(plan: Plan, folder: Path, seed: int, out: Path) -> None:
    import quality_hf

    records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    quality_hf.train(
        plan.task, folder / f"start-{seed}", folder / "tokenizer", records, out, seq_len=plan.seq_len,
        rows=plan.rows, steps=plan.steps, learning_rate=plan.learning_rate, warmup_steps=plan.steps // 10, seed=seed,
    )  # fmt: skip


def judged(plan: Plan, model: Path, folder: Path) -> float:
    from dist_lm.judge import Slicing, judge_file
    from dist_lm.predict import Request
    from dist_lm.predictors.base import PredictOptions

    stride = plan.options.get("doc_stride")
    options = PredictOptions(32, plan.seq_len, max_new_tokens=plan.max_new_tokens, doc_stride=stride)
    request = Request(str(model), str(folder / "test.jsonl"), options, plan.task)
    return float(judge_file(request, Slicing(resamples=0))["figures"][plan.metric])


def run(job: Job, plan: Plan, folder: Path) -> tuple[float, float]:
    """The figure, and the seconds that it took."""
    began = time.monotonic()
    prepare_environment()
    model = folder / f"{job.system}-{job.seed}"
    {"dist_lm": train_dist_lm, "hf": train_hf}[job.system](plan, folder, job.seed, model)
    return round(judged(plan, model, folder), 4), time.monotonic() - began


def missing(results: dict[str, float], names: list[str], seeds: int) -> Iterator[Job]:
    for name in names:
        for seed in range(1, seeds + 1):
            jobs = (Job(name, seed, system) for system in SYSTEMS)
            yield from (job for job in jobs if job.key not in results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs, models and results.json")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=list(PLANS), help="of the sets given, these")
    parser.add_argument("--steps", type=int, help="of each training, to try out the bench; needs an --out of its own")
    parser.add_argument("--workers", type=int, default=2, help="trainings side by side")
    for name, count in {"sst2": 2, "ner": 2, "qa": 1, "translation": 4, "wikitext": 2}.items():
        parser.add_argument(f"--{name}", nargs=count, metavar="FILE")
    arguments = parser.parse_args()
    prepare_environment()
    kept = arguments.out / "results.json"
    results: dict[str, float] = json.loads(kept.read_text()) if kept.exists() else {}
    plans = {name: replace(plan, steps=arguments.steps or plan.steps) for name, plan in PLANS.items()}
    names = [name for name in arguments.tasks or PLANS if getattr(arguments, name)]
    jobs = list(missing(results, names, arguments.seeds))
    for name in {job.name: None for job in jobs}:
        prepare_data(name, plans[name], getattr(arguments, name), arguments.out / name)
        for seed in {job.seed for job in jobs if job.name == name}:
            first_weights(plans[name], arguments.out / name, seed)
    # A fresh process each: neither system finds a generator or a thread of the other.
    settings: dict[str, Any] = {"mp_context": get_context("spawn"), "initializer": start_worker}
    with ProcessPoolExecutor(arguments.workers, max_tasks_per_child=1, **settings) as pool:
        running = {pool.submit(run, job, plans[job.name], arguments.out / job.name): job for job in jobs}
        for done in as_completed(running):
            job, (figure, seconds) = running[done], done.result()
            results[job.key] = figure
            disk.write_bytes(kept, json.dumps(results, indent=1).encode())
            print(f"{job.key}: {PLANS[job.name].metric} {figure:.4f}  ({seconds:.0f} s)", flush=True)
    print(
        json.dumps(
            {
                name: {
                    system: [results[Job(name, seed, system).key] for seed in range(1, arguments.seeds + 1)]
                    for system in SYSTEMS
                }
                for name in names
            }
        )
    )


if __name__ == "__main__":
    main()
