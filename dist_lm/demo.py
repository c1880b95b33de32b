"""The whole path by one command, on text that every machine has.

Enters: an empty folder.  Leaves: tokenizer, shards, runs, two models, and a table of what they do.
Promises: every stage is an ordinary `dist-lm` command, printed before it runs; a stage that is done
is not done again.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dist_lm.errors import EnvironmentFault
from dist_lm.metrics import read_metrics
from dist_lm.run_dir import RunDir

# By name: they are there after `pip install`, too.
PRETRAIN, FINETUNE = "recipe:demo-pretrain", "recipe:demo-finetune"
_POLL_S = 0.1
_FILL_MASK = (
    "return the number of [MASK] in the list.",
    "raise an [MASK] if the file does not exist.",
    "the default [MASK] is none.",
)


@dataclass
class Demo:
    """Where the demo stands."""

    out: Path
    began_at: float = field(default_factory=time.monotonic)
    figures: dict[str, str] = field(default_factory=dict)

    def stage(self, title: str) -> None:
        print(f"\n== {title}  [{time.monotonic() - self.began_at:.0f} s]", flush=True)

    def run(self, *words: str | Path) -> None:
        """One `dist-lm` command, shown and run to its end."""
        process = self.start(*words)
        _expect_success(process.wait(), words)

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        print("$ dist-lm " + shlex.join(str(word) for word in words), flush=True)
        return subprocess.Popen([sys.executable, "-m", "dist_lm", *map(str, words)])


def run_demo(out: Path) -> None:
    """Raises EnvironmentFault where a stage fails."""
    out.mkdir(parents=True, exist_ok=True)
    demo = Demo(out)
    _make_data(demo)
    pretrained = _pretrain(demo)
    accuracies = _finetune(demo, pretrained)
    _predict(demo, pretrained)
    _summary(demo, accuracies)


def _make_data(demo: Demo) -> None:
    out = demo.out
    demo.stage("1. Collect text: documentation of Python and of the installed packages")
    corpus = out / "corpus.jsonl"
    if not corpus.exists():
        demo.run("data", "corpus", "docs", "--out", corpus, "--limit-mb", "20")
    demo.stage("2. Train a tokenizer")
    if not (out / "tokenizer").exists():
        demo.run("tokenizer", "train", corpus, "--vocab-size", "6000", "--max-mb", "8", "--out", out / "tokenizer")
    demo.stage("3. Prepare shards")
    tokenizer = ("--tokenizer", out / "tokenizer")
    demo.run("data", "prepare", corpus, *tokenizer, "--out", out / "pairs", "--seq-len", "96")
    demo.run("data", "inspect", out / "pairs" / "heldout", *tokenizer, "--show", "2")
    demo.run("data", "corpus", "packages", corpus, "--out", out / "packages.jsonl")
    labelled = ("--kind", "classification", "--seq-len", "96", "--heldout", "0.3")
    demo.run("data", "prepare", out / "packages.jsonl", *tokenizer, "--out", out / "packages", *labelled)


def _paths(demo: Demo, data: str, run: Path) -> list[str]:
    """Overrides that put a recipe into the demo's folder."""
    prepared = demo.out / data
    return [
        f"data.train={prepared / 'train'}",
        f"data.heldout={prepared / 'heldout'}",
        f"data.tokenizer={demo.out / 'tokenizer'}",
        f"run.dir={run}",
    ]


def _pretrain(demo: Demo) -> Path:
    run, model = demo.out / "runs" / "pretrain", demo.out / "pretrained"
    demo.stage("4. Pretrain a BERT (MLM and NSP) on two ranks; one of them will be killed")
    if not model.exists():
        command = ("train", "-c", PRETRAIN, "--cpu", "2", *_paths(demo, "pairs", run))
        process = demo.start(*command)
        killer = threading.Thread(target=_kill_after_checkpoint, args=(RunDir(run), process), daemon=True)
        killer.start()
        _expect_success(process.wait(), command)
        demo.run("export", run, "--out", model)
    evaluations = read_metrics(RunDir(run).metrics, "eval")
    from dist_lm.data.inspect import unigram_entropy

    entropy = unigram_entropy(demo.out / "pairs" / "heldout")
    demo.figures["unigram entropy of the held-out tokens"] = f"{entropy:.3f} nats"
    demo.figures["held-out MLM loss"] = f"{evaluations[-1]['mlm_loss']:.3f} nats"
    demo.figures["held-out MLM accuracy"] = f"{evaluations[-1]['mlm_accuracy']:.1%}"
    demo.figures["held-out NSP accuracy"] = f"{evaluations[-1]['nsp_accuracy']:.1%}"
    demo.figures["attempts of the pretraining"] = str(len(list(RunDir(run).attempts.glob("*.json"))))
    return model


def _kill_after_checkpoint(run_dir: RunDir, launcher: subprocess.Popen[bytes]) -> None:
    """SIGKILL rank 1 some steps after the first checkpoint of the first attempt."""
    while launcher.poll() is None:
        saved = [record["step"] for record in read_metrics(run_dir.metrics, "event") if "saved" in record]
        trained = [record["step"] for record in read_metrics(run_dir.metrics, "train")]
        if len(list(run_dir.attempts.glob("*.json"))) > 1:
            return
        if saved and trained and trained[-1] > saved[-1]:
            pid = run_dir.attempt_facts(1)["pids"][1]
            print(f"\n** demo: SIGKILL to rank 1 (pid {pid}), {trained[-1]} steps done **\n", flush=True)
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(_POLL_S)


def _finetune(demo: Demo, pretrained: Path) -> dict[str, float]:
    demo.stage("5. Fine-tune: which package does a docstring come from?  Pretrained, then from scratch")
    accuracies = {}
    architecture = _architecture(pretrained)
    for name, start in (
        ("pretrained", [f"model.from={pretrained}"]),
        ("from scratch", ["model.from=null", "model.size=tiny", f"model.overrides={architecture}"]),
    ):
        run = demo.out / "runs" / f"finetune-{name.replace(' ', '-')}"
        demo.run("train", "-c", FINETUNE, "--cpu", "2", *_paths(demo, "packages", run), *start)
        accuracies[name] = read_metrics(RunDir(run).metrics, "eval")[-1]["label_accuracy"]
    return accuracies


def _architecture(model: Path) -> dict[str, Any]:
    """Shape of the pretrained model, so that the one from scratch is its equal."""
    import json

    config = json.loads((model / "config.json").read_text())
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    return {name: config[name] for name in names}


def _predict(demo: Demo, pretrained: Path) -> None:
    demo.stage("6. Export, and predict with plain transformers")
    classifier = demo.out / "classifier"
    if not classifier.exists():
        demo.run("export", demo.out / "runs" / "finetune-pretrained", "--out", classifier)
    from dist_lm.worker import prepare_environment

    prepare_environment()
    from transformers import pipeline

    fill = pipeline("fill-mask", model=str(pretrained), top_k=3)
    for text in _FILL_MASK:
        words = ", ".join(f"{guess['token_str']} {guess['score']:.0%}" for guess in fill(text))
        print(f"  {text:58} {words}")
    classify = pipeline("text-classification", model=str(classifier), truncation=True)
    for text, label in _heldout_texts(demo):
        guess = classify(text)[0]
        shown = " ".join(text.split())[:56]
        print(f"  {shown:58} {guess['label']} {guess['score']:.0%} (is {label})")


def _heldout_texts(demo: Demo, count: int = 4) -> list[tuple[str, str]]:
    """A held-out text of each of the first `count` labels that appear."""
    from dist_lm.data.inspect import decoded_rows

    chosen: dict[str, str] = {}
    for text, label in decoded_rows(demo.out / "packages" / "heldout", demo.out / "tokenizer"):
        chosen.setdefault(label, text)
        if len(chosen) == count:
            break
    return [(text, label) for label, text in chosen.items()]


def _summary(demo: Demo, accuracies: dict[str, float]) -> None:
    for name, accuracy in accuracies.items():
        demo.figures[f"accuracy over packages, {name}"] = f"{accuracy:.1%}"
    demo.figures["time"] = f"{time.monotonic() - demo.began_at:.0f} s"
    demo.stage("Summary")
    width = max(map(len, demo.figures))
    for name, value in demo.figures.items():
        print(f"  {name:{width}}  {value}")
    run = demo.out / "runs" / "pretrain"
    print(
        f"""
Next:
  dist-lm tb {run}   # curves in TensorBoard
  dist-lm report {run}   # one HTML page of it
  dist-lm recipes --copy mine   # recipes, DeepSpeed settings and cluster files, to change
""",
        flush=True,
    )


def _expect_success(code: int, words: Sequence[str | Path]) -> None:
    if code:
        raise EnvironmentFault(
            f"a stage of the demo ended with code {code}",
            where="dist-lm " + shlex.join(str(word) for word in words),
            do="Its messages stand above.  Run the demo again: finished stages are not repeated.",
        )
