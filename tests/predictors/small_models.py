"""Small Hugging Face folders with the topics tokenizer, weights drawn from a seed; what they predict."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertConfig, GPT2Config, T5Config

from dist_lm.data.tokenizer import load_tokenizer
from dist_lm.predict import Request, predict_file
from dist_lm.predictors.base import PredictOptions

LABELS = {
    "BertForSequenceClassification": ["neg", "neutral", "pos"],
    "BertForTokenClassification": ["B-LOC", "B-PER", "I-LOC", "I-PER", "O"],
}


def save_model(class_name: str, tokenizer_folder: Path, out: Path, **changes: Any) -> Path:
    """An untrained model of this class.  Weights are large, so that its answers differ from record to record."""
    tokenizer = load_tokenizer(tokenizer_folder)
    made = changes.pop("dist_lm", {"seq_len": 64})
    if class_name.startswith("Bert"):
        labels = changes.pop("labels", LABELS.get(class_name, ["a", "b"]))
        config: Any = BertConfig(
            vocab_size=tokenizer.vocab_size, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=64, max_position_embeddings=128, pad_token_id=tokenizer.pad_id,
            initializer_range=0.3, id2label=dict(enumerate(labels)), **changes,
        )  # fmt: skip
    elif class_name.startswith("T5"):
        config = T5Config(
            vocab_size=tokenizer.vocab_size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
            pad_token_id=tokenizer.pad_id, eos_token_id=tokenizer.sep_id, decoder_start_token_id=tokenizer.pad_id,
            **changes,
        )  # fmt: skip
    else:
        config = GPT2Config(
            vocab_size=tokenizer.vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3,
            bos_token_id=tokenizer.cls_id, eos_token_id=tokenizer.sep_id, **changes,
        )  # fmt: skip
    config.dist_lm = made
    torch.manual_seed(1)
    getattr(transformers, class_name)(config).save_pretrained(out)
    for file in tokenizer_folder.glob("tokenizer*"):
        shutil.copyfile(file, out / file.name)
    return out


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predictions(folder: Path, records: list[dict[str, Any]], tmp_path: Path, **options: Any) -> list[Any]:
    source = write_records(tmp_path / "in.jsonl", records)
    out = tmp_path / "out.jsonl"
    predict_file(Request(str(folder), str(source), PredictOptions(**{"batch_rows": 2, **options})), out)
    written = read_records(out)
    assert [{k: v for k, v in line.items() if k != "prediction"} for line in written] == records
    return [line["prediction"] for line in written]
