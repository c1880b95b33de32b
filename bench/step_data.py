"""Real text for bench/step.py: the docs corpus, tokenizers, prepared rows, and one rank's micro-batches.

Enters: a folder.  Leaves: in it a corpus, and for each model a tokenizer and rows; micro-batches.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

CORPUS_MB = 4.0
VOCABULARY = 8000
SEED = 1


class Recipe(NamedTuple):
    """What a model of the bench is trained on."""

    task: dict[str, Any]
    kind: str
    tokenizer_kind: str
    model: dict[str, Any]
    rows: int
    """Of a micro-batch."""


# The models and micro-batches of the recipes launch/recipes/*-mini-docs.yaml.
RECIPES = {
    "bert": Recipe(
        {"name": "mlm"},
        "pairs",
        "wordpiece",
        {
            "family": "bert",
            "size": "mini",
            "overrides": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        },
        16,
    ),
    "gpt": Recipe(
        {"name": "causal_lm"},
        "tokens",
        "bpe",
        {
            "family": "gpt2",
            "size": "mini",
            "overrides": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        },
        8,
    ),
}


class Step(NamedTuple):
    """One step's micro-batches on this rank, and the targets of all ranks."""

    micro_batches: list[Any]
    targets: dict[str, float]
    tokens: float
    """Tokens of real text, over all ranks."""
    slots: float


def prepare_text(folder: Path, seq_len: int) -> None:
    """Corpus, tokenizers and rows of every recipe; what is there already stays."""
    from dist_lm.data.corpus_docs import write_docs_corpus
    from dist_lm.data.prepare import PrepareOptions, prepare
    from dist_lm.data.tokenizer import train_tokenizer

    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        write_docs_corpus(corpus, limit_mb=CORPUS_MB)
    texts = [json.loads(line)["text"] for line in corpus.read_text("utf-8").splitlines()]
    for name, recipe in RECIPES.items():
        tokenizer = folder / f"{name}-tokenizer"
        if not tokenizer.exists():
            train_tokenizer(texts, vocab_size=VOCABULARY, out=tokenizer, kind=recipe.tokenizer_kind)
        rows = folder / f"{name}-{seq_len}"
        if not rows.exists():
            options = PrepareOptions(
                [str(corpus)], rows, tokenizer, kind=recipe.kind, seq_len=seq_len, heldout_fraction=0.0
            )
            prepare(options)


def open_task(folder: Path, model: str, seq_len: int, *, packing: bool) -> tuple[Any, Any]:
    """The task of a model, and its training set; `packing`: samples share rows, where rows are not full anyway."""
    from pydantic import TypeAdapter

    from dist_lm.config import ModelSection, SourceSpec
    from dist_lm.config import Task as TaskSettings
    from dist_lm.data.tokenizer import load_tokenizer
    from dist_lm.data.training_set import TrainingSet
    from dist_lm.tasks.registry import build_task

    recipe = RECIPES[model]
    source = SourceSpec(path=str(folder / f"{model}-{seq_len}" / "train"))
    length = seq_len if recipe.kind == "tokens" else None
    data = TrainingSet([source], seed=SEED, lanes=4, era=256, seq_len=length)
    own = {"packing": packing} if recipe.kind == "pairs" else {}
    settings = TypeAdapter(TaskSettings).validate_python({**recipe.task, **own})
    task = build_task(settings, load_tokenizer(folder / f"{model}-tokenizer"), data.view, SEED)
    # It learns from the model whether samples can share rows.
    task.build_model(ModelSection(**recipe.model))
    return task, data


def load_steps(task: Any, data: Any, ranks: Any, *, rows: int, accumulation: int, count: int) -> list[Step]:
    """`count` steps of `accumulation` micro-batches of `rows` rows on this rank."""
    from dist_lm.data.stream import Stream
    from dist_lm.schedule import BatchPlan

    global_rows = rows * accumulation * ranks.world_size
    plan = BatchPlan.divide(global_rows, rows, ranks.world_size)
    steps = []
    with Stream(
        data,
        global_rows=global_rows,
        rank=ranks.rank,
        world_size=ranks.world_size,
        partner_columns=task.partner_columns,
    ) as stream:
        for _ in range(count):
            parts = [task.collate(part) for part in task.divide(next(stream).rows, plan)]
            counts = [sum(part.targets[name] for part in parts) for name in task.objectives]
            local = [*counts, sum(part.tokens for part in parts), sum(part.slots for part in parts)]
            *counts, tokens, slots = ranks.sum([float(value) for value in local])
            steps.append(Step(parts, dict(zip(task.objectives, counts, strict=True)), tokens, slots))
    return steps
