"""Quality beside Hugging Face's Trainer: same first weights, data, steps and learning rate; three seeds.

    python bench/quality.py --out work/quality \
        --sst2 sst2.train.txt.gz sst2.test.txt.gz \
        --ner wikiann_en.train.txt.gz wikiann_en.test.txt.gz \
        --qa xquad.en.json.gz \
        --translation multi30k.train.en.gz multi30k.train.de.gz multi30k.test.en.gz multi30k.test.de.gz \
        --wikitext wikitext2.valid.txt.gz wikitext2.test.txt.gz

Give the sets that you have.  How it measures: a new small model of each seed is saved once, both
systems start from it, on one rank, one thread, fp32; features of Trainer are those of the example
scripts.  Both models are judged by `dist-lm eval` on the same test records.  The last line is JSON:
{task: {"dist_lm": [a figure a seed], "hf": [...]}}; for WikiText the figure is perplexity, for the
others higher is better.  Results of a run stay in --out; the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import quality_data

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
    max_new_tokens: int = 48


PLANS = {
    "sst2": Plan("classification", "classification", "accuracy", "wordpiece", 64, 32, 400, 5e-4, {}, 1821),
    "ner": Plan("token_classification", "token_classification", "entity_f1", "wordpiece", 64, 32, 600, 1e-3, {}, 2000),
    "qa": Plan(
        "question_answering", "question_answering", "f1", "wordpiece", 192, 16, 200, 5e-4, {"doc_stride": 48}, 300
    ),
    "translation": Plan("seq2seq", "seq2seq", "bleu", "t5", 48, 32, 800, 2e-3, {}, 200),
    "wikitext": Plan("causal_lm", "tokens", "perplexity", "bpe", 96, 16, 300, 2e-3, {}, 400),
}
VOCABULARY = 6000


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


def config_of(plan: Plan, folder: Path, run: Path, seed: int) -> Any:
    from dist_lm.config import RunConfig

    family = {"seq2seq": {"family": "t5"}, "causal_lm": {"family": "gpt2"}}.get(plan.task, {})
    data: dict[str, Any] = {"train": str(folder / "data" / "train"), "tokenizer": str(folder / "tokenizer")}
    if plan.kind == "tokens":
        data["seq_len"] = plan.seq_len
    return RunConfig.model_validate(
        {
            "task": {"name": plan.task},
            "model": {"size": "tiny", **family},
            "data": data,
            "batch": {"global": plan.rows, "micro": plan.rows},
            "optim": {"lr": plan.learning_rate, "schedule": {"kind": "linear", "warmup_steps": plan.steps // 10}},
            "run": {"dir": str(run), "steps": plan.steps, "seed": seed, "log_every": 100, "save_every": plan.steps},
            "zero": 1,
        }
    )


def first_weights(plan: Plan, config: Any, folder: Path, seed: int) -> None:
    """A new model as a folder, so that both systems begin alike."""
    from dist_lm.data.manifest import Manifest
    from dist_lm.data.tokenizer import load_tokenizer
    from dist_lm.data.views import view_of
    from dist_lm.tasks.registry import build_task

    tokenizer = load_tokenizer(config.data.tokenizer)
    view = view_of(Manifest.load(config.data.train), config.data.seq_len)
    model = build_task(config.task, tokenizer, view, seed).build_model(config.model)
    model.config.architectures = [type(model).__name__]
    model.save_pretrained(folder)


def judged(plan: Plan, model: Path, folder: Path) -> float:
    from dist_lm.judge import Slicing, judge_file
    from dist_lm.predict import Request
    from dist_lm.predictors.base import PredictOptions

    stride = plan.options.get("doc_stride")
    options = PredictOptions(32, plan.seq_len, max_new_tokens=plan.max_new_tokens, doc_stride=stride)
    request = Request(str(model), folder / "test.jsonl", options, plan.task)
    return float(judge_file(request, Slicing(resamples=0))["figures"][plan.metric])


def compare(name: str, plan: Plan, folder: Path, seed: int, ranks: Any) -> dict[str, float]:
    import quality_hf

    from dist_lm.config_files import LoadedConfig
    from dist_lm.stop import StopFlag
    from dist_lm.train import train

    start, run, theirs = (folder / f"{part}-{seed}" for part in ("start", "run", "hf"))
    config = config_of(plan, folder, run, seed)
    if not start.exists():
        first_weights(plan, config, start, seed)
    config = type(config).model_validate(
        {**config.model_dump(by_alias=True, mode="json"), "model": {"from": str(start)}}
    )
    train(LoadedConfig(config, {}), ranks, stop=StopFlag(), launcher="bench")
    if not (theirs / "config.json").exists():
        records = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
        quality_hf.train(
            plan.task, start, folder / "tokenizer", records, theirs, seq_len=plan.seq_len, rows=plan.rows,
            steps=plan.steps, learning_rate=plan.learning_rate, warmup_steps=plan.steps // 10, seed=seed,
        )  # fmt: skip
    figures = {"dist_lm": judged(plan, run, folder), "hf": judged(plan, theirs, folder)}
    print(f"{name} seed {seed}: {plan.metric} " + "  ".join(f"{who} {value:.4f}" for who, value in figures.items()))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and models")
    parser.add_argument("--seeds", type=int, default=3)
    for name, count in {"sst2": 2, "ner": 2, "qa": 1, "translation": 4, "wikitext": 2}.items():
        parser.add_argument(f"--{name}", nargs=count, metavar="FILE")
    arguments = parser.parse_args()
    prepare_environment()
    from dist_lm.cluster.local import free_port
    from dist_lm.ranks import Ranks, disconnect

    os.environ["MASTER_PORT"] = str(free_port())
    results: dict[str, dict[str, list[float]]] = {}
    chosen = {name: plan for name, plan in PLANS.items() if getattr(arguments, name)}
    for name, plan in chosen.items():
        prepare_data(name, plan, getattr(arguments, name), arguments.out / name)
    ranks = Ranks.connect()
    for name, plan in chosen.items():
        results[name] = {"dist_lm": [], "hf": []}
        for seed in range(1, arguments.seeds + 1):
            for who, value in compare(name, plan, arguments.out / name, seed, ranks).items():
                results[name][who].append(round(value, 4))
    disconnect()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
