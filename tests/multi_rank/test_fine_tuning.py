"""Every fine-tuning task from rows to predictions: two ranks equal one, exports equal checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    pipeline,
)

from dist_lm.data.heldout import HeldoutRows
from dist_lm.data.manifest import Manifest
from dist_lm.data.order import Order
from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.data.views import view_of
from dist_lm.errors import ConfigError
from dist_lm.export import export, export_adapter
from dist_lm.judge import Slicing, judge_file
from dist_lm.metrics import read_metrics
from dist_lm.predict import Request, predict_file
from dist_lm.predictors.base import PredictOptions
from dist_lm.trained import open_trained
from tests.multi_rank.test_export import check_killed_exports
from tests.predictors.small_models import read_records, save_model, write_records
from tests.rank_scenarios import losses, scenario, train_scenarios
from tests.tasks.prepared_rows import write_dataset

# Kind of data, stage of ZeRO, task settings, model folder (None: a new BERT), options of the kind.
CASES: dict[str, tuple[str, int, dict[str, Any], str | None, dict[str, Any]]] = {
    "one": ("classification", 0, {"class_weights": {"long": 2.0}, "label_smoothing": 0.1}, None, {}),
    "pairs": ("classification", 1, {}, None, {"text_pair": True}),
    "many": ("classification", 2, {}, None, {"labels": "many"}),
    "number": ("classification", 1, {}, None, {"labels": "number"}),
    "tags": ("token_classification", 3, {"label_tokens": "all"}, None, {}),
    "answers": ("question_answering", 2, {}, None, {"doc_stride": 8}),
    "translation": ("seq2seq", 3, {"label_smoothing": 0.1}, "T5ForConditionalGeneration", {"prefix": "turn: "}),
    "chat": ("instruction", 1, {}, "GPT2LMHeadModel", {}),
}
# Case of a LoRA run on two ranks: class of its base, stage of ZeRO, class of what is exported.
ADAPTED: dict[str, tuple[str, int, Any]] = {
    "chat": ("GPT2LMHeadModel", 1, AutoModelForCausalLM),
    "one": ("BertForMaskedLM", 3, AutoModelForSequenceClassification),
    "translation": ("T5ForConditionalGeneration", 3, AutoModelForSeq2SeqLM),
}
STEPS = 4
TRAINER_STEPS = 12
"""An epoch."""


def record_of(case: str, number: int, text: str) -> dict[str, Any]:
    words = text.split()[:20]
    line = " ".join(words)
    long = len(line) > 110
    match case:
        case "one":
            return {"text": line, "label": "long" if long else "short"}
        case "pairs":
            return {"text": line, "text_pair": " ".join(words[:5]), "label": "long" if long else "short"}
        case "many":
            return {"text": line, "label": [name for name, held in (("long", long), ("odd", number % 2)) if held]}
        case "number":
            return {"text": line, "label": len(line) / 100}
        case "tags":
            return {"tokens": words, "tags": ["B-CAP" if word[0].isupper() else "O" for word in words]}
        case "answers":
            answer = words[number % len(words)]
            answers = {"text": [answer], "answer_start": [line.index(answer)]}
            return {"question": "which word is it?", "context": line, "answers": answers}
        case "translation":
            return {"source": line, "target": " ".join(reversed(words))}
        case _:
            return {"prompt": line, "response": " ".join(words[:4])}


@pytest.fixture(scope="module")
def root(topics_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each case trained on one rank and on two: ROOT/CASE-1 and ROOT/CASE-2."""
    root = tmp_path_factory.mktemp("fine-tuning")
    tokenizer = load_tokenizer(topics_data / "tokenizer")
    texts = [part for name in sorted(topics) for part in topics[name].split("\n\n") if len(part.split()) > 12][:120]
    configs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for case, (kind, stage, settings, model, options) in CASES.items():
        records = [record_of(case, number, text) for number, text in enumerate(texts)]
        for split, part in (("train", records[:96]), ("heldout", records[96:])):
            write_dataset(root / case / split, kind, part, tokenizer, seq_len=64, **options)
        write_records(root / case / "heldout.jsonl", records[96:])
        if model:
            no_dropout: dict[str, Any] = {"dropout_rate": 0.0}
            if model == "GPT2LMHeadModel":
                no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            save_model(model, topics_data / "tokenizer", root / case / "model", **no_dropout)
        for num_ranks, planned in configs.items():
            config = scenario(
                topics_data, root / f"{case}-{num_ranks}",
                task={"name": kind, **settings}, zero=stage, run__steps=STEPS,
                data__train=str(root / case / "train"), data__heldout=str(root / case / "heldout"),
                batch__global=8, batch__micro=3,
            )  # fmt: skip
            if case == "number":
                # Adam's first steps are signs of gradients: rounding would decide those that are nearly zero,
                # and a correlation of predictions that hardly vary yet would show it.
                config["optim"]["eps"] = 1e-4
            if model:
                config["model"] = {"from": str(root / case / "model")}
            planned.append(config)
            if case == "one" and num_ranks == 2:
                plain = json.loads(json.dumps(config))
                folder = save_model(
                    "BertForSequenceClassification", topics_data / "tokenizer", root / "trainer" / "model",
                    labels=["long", "short"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                )  # fmt: skip
                plain["task"], plain["zero"], plain["model"] = {"name": kind}, 2, {"from": str(folder)}
                plain["optim"]["schedule"] = {"kind": "linear"}
                plain["run"] |= {"dir": str(root / "trainer-2"), "steps": TRAINER_STEPS}
                planned.append(plain)
            if case == "chat" and num_ranks == 1:
                dropped = json.loads(json.dumps(config))
                folder = save_model(model, topics_data / "tokenizer", root / "dropout" / "model", resid_pdrop=0.5)
                dropped["model"]["from"] = str(folder)
                dropped["run"]["dir"] = str(root / "dropout-1")
                planned.append(dropped)
            if case in ADAPTED and num_ranks == 2:
                class_name, stage, _ = ADAPTED[case]
                adapted = json.loads(json.dumps(config))
                folder = root / case / "model"
                if not model:
                    save_model(class_name, topics_data / "tokenizer", folder)
                adapted["model"] = {"from": str(folder), "lora": {"rank": 4, "dropout": 0.0}}
                adapted["zero"], adapted["optim"]["lr"] = stage, 0.05
                adapted["run"]["dir"] = str(root / f"lora-{case}-2")
                planned.append(adapted)
    for num_ranks, planned in configs.items():
        train_scenarios(root, planned, num_ranks=num_ranks)
    return root


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_and_judge_as_one(root: Path, case: str) -> None:
    one, two = losses(root / f"{case}-1"), losses(root / f"{case}-2")
    assert len(one) == STEPS
    assert two == pytest.approx(one, rel=2e-5)
    figures = [read_metrics(root / f"{case}-{n}" / "metrics.jsonl", "eval")[-1] for n in (1, 2)]
    for record in figures:
        del record["time"], record["kind"]
    # Counts of classes, exact whatever the number of ranks.
    assert figures[1].pop("tables") == figures[0].pop("tables")
    assert figures[1].keys() == figures[0].keys()
    # The correlation of predictions that hardly vary yet shows the rounding of four steps.
    assert figures[1] == pytest.approx(figures[0], rel=1e-4, abs=2e-4)
    expected = {
        "one": {"accuracy", "macro_f1", "mcc"}, "pairs": {"mcc"}, "many": {"micro_f1", "exact_match"},
        "number": {"pearson", "spearman"}, "tags": {"entity_f1", "tag_accuracy"},
        "answers": {"span_accuracy"}, "translation": {"target_accuracy"}, "chat": {"answer_accuracy"},
    }  # fmt: skip
    assert expected[case] <= figures[0].keys()


def test_losses_are_those_of_trainer_step_by_step(root: Path, tmp_path: Path) -> None:
    run = yaml.safe_load((root / "trainer-2" / "config.yaml").read_text())
    view = view_of(Manifest.load(root / "one" / "train"), None)
    rows = next(iter(HeldoutRows(str(root / "one" / "train"), rank=0, world_size=1, micro_rows=view.num_rows)))
    order = Order(view.shard_rows, seed=run["run"]["seed"], lanes=run["data"]["lanes"], era=run["data"]["era"])
    tokenizer = AutoTokenizer.from_pretrained(root / "trainer" / "model")
    features = []
    for row in order.locate(np.arange(TRAINER_STEPS * run["batch"]["global"])).row:
        tokens = rows.columns["tokens"][row, : rows.columns["length"][row]].tolist()
        ids = [tokenizer.cls_token_id, *tokens, tokenizer.sep_token_id]
        features.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": int(rows.columns["label"][row])})
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=run["batch"]["global"], max_steps=TRAINER_STEPS, use_cpu=True,
        learning_rate=run["optim"]["lr"], weight_decay=run["optim"]["weight_decay"], max_grad_norm=run["optim"]["clip"],
        adam_beta2=run["optim"]["betas"][1], lr_scheduler_type="linear", logging_steps=1, report_to=[],
        save_strategy="no", disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(root / "trainer" / "model")
    trainer = Trainer(model, arguments, train_dataset=features, data_collator=DataCollatorWithPadding(tokenizer))
    trainer.train()
    theirs = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    ours = losses(root / "trainer-2")
    assert len(theirs) == TRAINER_STEPS
    assert [ours[step] for step in sorted(ours)] == pytest.approx(theirs, rel=1e-4)


def test_loaded_weights_are_trained_with_the_dropout_of_their_config(root: Path) -> None:
    # Only dropout tells the two models apart; it changes the loss from the first step on.
    assert losses(root / "dropout-1")[1] != pytest.approx(losses(root / "chat-1")[1], rel=1e-3)


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_are_exported_merged_or_alone(root: Path, tmp_path: Path, case: str) -> None:
    from peft import PeftModel

    run, folder, auto_class = root / f"lora-{case}-2", root / case / "model", ADAPTED[case][2]
    ids = AutoTokenizer.from_pretrained(folder)("the import statement", return_tensors="pt")["input_ids"]
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids} if case == "translation" else {})}
    assert export(str(run), tmp_path / "merged").largest_logit_difference == 0.0
    merged = auto_class.from_pretrained(tmp_path / "merged").eval()
    labels = {"num_labels": merged.config.num_labels} if case == "one" else {}
    torch.manual_seed(1)
    base = auto_class.from_pretrained(folder, **labels).eval()
    before = base(**inputs).logits
    assert merged.state_dict().keys() == base.state_dict().keys()
    export_adapter(str(run), tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert torch.allclose(adapted(**inputs).logits, merged(**inputs).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, merged(**inputs).logits, atol=1e-3)
    with pytest.raises(ConfigError, match="has no adapter"):
        export_adapter(str(root / f"{case}-2"), tmp_path / "none")


def test_an_export_of_an_adapter_that_is_killed_leaves_nothing_under_its_name(root: Path, tmp_path: Path) -> None:
    case = next(iter(ADAPTED))
    check_killed_exports(export_adapter, root / f"lora-{case}-2", STEPS, tmp_path / "exports")


@pytest.mark.parametrize("case", CASES)
def test_an_export_predicts_what_the_run_predicts(root: Path, case: str, tmp_path: Path) -> None:
    run = root / f"{case}-2"
    done = export(str(run), tmp_path / "model")
    assert done.step == STEPS
    assert done.largest_logit_difference == 0.0
    options = PredictOptions(max_new_tokens=8)
    for name, model in (("run", str(run)), ("folder", str(tmp_path / "model"))):
        predict_file(Request(model, str(root / case / "heldout.jsonl"), options), tmp_path / f"{name}.jsonl")
    lines = (tmp_path / "run.jsonl").read_text()
    assert lines == (tmp_path / "folder.jsonl").read_text()
    assert len(read_records(tmp_path / "run.jsonl")) == 24


@pytest.mark.parametrize(
    ("case", "names"),
    [
        ("one", ["accuracy", "macro_f1", "mcc"]),
        ("pairs", ["accuracy"]),
        ("many", ["micro_f1"]),
        ("number", ["pearson", "spearman", "mse"]),
        ("tags", ["tag_accuracy", "entity_f1"]),
    ],
)
def test_eval_of_records_finds_the_figures_of_the_held_out_rows(root: Path, case: str, names: list[str]) -> None:
    heldout = read_metrics(root / f"{case}-2" / "metrics.jsonl", "eval")[-1]
    report = judge_file(Request(str(root / f"{case}-2"), str(root / case / "heldout.jsonl")), Slicing(resamples=0))
    for name in names:
        assert report["figures"][name] == pytest.approx(heldout[name], abs=1e-3), name


def test_eval_of_generated_text_and_of_answers(root: Path) -> None:
    options = PredictOptions(max_new_tokens=8)
    for case, names in (("translation", {"bleu", "chrf", "rouge_l"}), ("answers", {"exact_match", "f1"})):
        request = Request(str(root / f"{case}-2"), str(root / case / "heldout.jsonl"), options)
        assert names <= judge_file(request, Slicing(resamples=10))["figures"].keys()


def test_answers_foreseen_in_rows_and_in_records_are_the_same(root: Path) -> None:
    heldout = read_metrics(root / "chat-2" / "metrics.jsonl", "eval")[-1]
    # Dialogues whose answer lies behind the end of a row are lost to both, and counted by both.
    request = Request(str(root / "chat-2"), str(root / "chat" / "heldout.jsonl"), max_bad=10)
    report = judge_file(request, Slicing(resamples=0))
    assert 0 < report["bad_records"] < 10
    assert report["figures"]["loss"] == pytest.approx(heldout["answer_loss"], rel=1e-4)
    assert report["figures"]["accuracy"] == pytest.approx(heldout["answer_accuracy"], rel=1e-6)


@pytest.mark.parametrize(
    ("case", "task"), [("one", "text-classification"), ("tags", "token-classification"), ("chat", "text-generation")]
)
def test_plain_pipelines_load_an_export(root: Path, case: str, task: str, tmp_path: Path) -> None:
    export(str(root / f"{case}-1"), tmp_path / "model")
    options = {"chat": {"max_new_tokens": 4}, "tags": {"ignore_labels": []}}.get(case, {})
    assert pipeline(task, model=str(tmp_path / "model"))("the import statement", **options)
    card = (tmp_path / "model" / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card
    assert "| task.name |" in card
    assert str(root) not in card


def test_a_chat_template_goes_with_the_export(root: Path, tmp_path: Path) -> None:
    export(str(root / "chat-1"), tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "### user\nwhy?\n### assistant\n"


def test_weights_are_parted_into_files_of_the_size_asked_for(root: Path, tmp_path: Path) -> None:
    export(str(root / "one-1"), tmp_path / "model", max_shard_gb=1e-4)
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 1
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    names = [set(safe_open(file, "pt").keys()) for file in files]
    assert not set.intersection(*names)
    assert open_trained(str(tmp_path / "model")).task == "classification"


def test_the_best_checkpoint_is_the_one_that_the_run_noted(root: Path, tmp_path: Path) -> None:
    run = root / "one-1"
    with pytest.raises(ConfigError, match="knows no best checkpoint"):
        export(f"{run}@best", tmp_path / "model")
    (run / "checkpoints" / "BEST.json").write_text('{"step": 3, "metric": "loss", "value": 1.0}')
    assert export(f"{run}@best", tmp_path / "model").step == 3
    assert export(f"{run}@latest", tmp_path / "latest").step == STEPS
