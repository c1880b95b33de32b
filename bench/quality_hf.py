"""Hugging Face's side of bench/quality.py: Trainer, with the features of the example scripts.

Enters: a model folder, records, a seed.  Leaves: a trained model folder.
The features are those of run_glue, run_ner, run_qa, run_translation and run_clm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf

Records = list[dict[str, Any]]


def _classification(records: Records, tokenizer: Any, model: Any, seq_len: int) -> list[dict[str, Any]]:
    label2id = model.config.label2id
    return [
        {**tokenizer(record["text"], truncation=True, max_length=seq_len), "labels": label2id[record["label"]]}
        for record in records
    ]


def _tagging(records: Records, tokenizer: Any, model: Any, seq_len: int) -> list[dict[str, Any]]:
    features = []
    for record in records:
        encoded = tokenizer(record["tokens"], is_split_into_words=True, truncation=True, max_length=seq_len)
        labels, before = [], None
        for word in encoded.word_ids():
            first = word is not None and word != before
            labels.append(model.config.label2id[record["tags"][word]] if first else -100)
            before = word
        features.append({**encoded, "labels": labels})
    return features


def _answering(records: Records, tokenizer: Any, model: Any, seq_len: int) -> list[dict[str, Any]]:
    features = []
    for record in records:
        encoded = tokenizer(
            record["question"].lstrip(), record["context"], truncation="only_second", max_length=seq_len,
            stride=seq_len // 4, return_overflowing_tokens=True, return_offsets_mapping=True, padding="max_length",
        )  # fmt: skip
        answer = record["answers"][0]
        begin, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
        for number, offsets in enumerate(encoded["offset_mapping"]):
            inside = [place for place, part in enumerate(encoded.sequence_ids(number)) if part == 1]
            start = stop = 0
            if offsets[inside[0]][0] <= begin and offsets[inside[-1]][1] >= end:
                start = max(place for place in inside if offsets[place][0] <= begin)
                stop = min(place for place in inside if offsets[place][1] >= end)
            names = ("input_ids", "token_type_ids", "attention_mask")
            feature = {name: encoded[name][number] for name in names}
            features.append({**feature, "start_positions": start, "end_positions": stop})
    return features


def _translation(records: Records, tokenizer: Any, model: Any, seq_len: int) -> list[dict[str, Any]]:
    return [
        {
            "input_ids": tokenizer(record["source"], truncation=True, max_length=seq_len)["input_ids"],
            "labels": tokenizer(text_target=record["target"], truncation=True, max_length=seq_len)["input_ids"],
        }
        for record in records
    ]


def _language(records: Records, tokenizer: Any, model: Any, seq_len: int) -> list[dict[str, Any]]:
    tokens: list[int] = []
    for record in records:
        tokens += [*tokenizer(record["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    blocks = [tokens[begin : begin + seq_len] for begin in range(0, len(tokens) - seq_len + 1, seq_len)]
    return [{"input_ids": block, "labels": block} for block in blocks]


TASKS: dict[str, tuple[Any, Any, Any]] = {
    "classification": (hf.AutoModelForSequenceClassification, _classification, hf.DataCollatorWithPadding),
    "token_classification": (hf.AutoModelForTokenClassification, _tagging, hf.DataCollatorForTokenClassification),
    "question_answering": (hf.AutoModelForQuestionAnswering, _answering, None),
    "seq2seq": (hf.AutoModelForSeq2SeqLM, _translation, hf.DataCollatorForSeq2Seq),
    "causal_lm": (hf.AutoModelForCausalLM, _language, None),
}


def train(
    task: str, start: Path, tokenizer_folder: Path, records: Records, out: Path,
    *, seq_len: int, rows: int, steps: int, learning_rate: float, warmup_steps: int, seed: int,
) -> None:  # fmt: skip
    """Train as Trainer does, and save the model."""
    auto_class, make_features, collator = TASKS[task]
    tokenizer = hf.AutoTokenizer.from_pretrained(tokenizer_folder)
    model = auto_class.from_pretrained(start, dtype=torch.float32)
    features = make_features(records, tokenizer, model, seq_len)
    arguments = hf.TrainingArguments(
        output_dir=str(out / "trainer"), max_steps=steps, per_device_train_batch_size=rows,
        learning_rate=learning_rate, warmup_steps=warmup_steps, lr_scheduler_type="linear", weight_decay=0.01,
        max_grad_norm=1.0, seed=seed, data_seed=seed, use_cpu=True, report_to=[], save_strategy="no",
        logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    options = {"data_collator": collator(tokenizer)} if collator else {}
    hf.Trainer(model, arguments, train_dataset=features, **options).train()
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
