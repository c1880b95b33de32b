"""Models and batches of bench/gpu.py: shapes of well-known models, random tokens.

Enters: a name, a number of rows.  Leaves: a Hugging Face model, batches, and FLOPs a token.

FLOPs a token are 6 N + 12 L h s (Kaplan et al. 2020, Chowdhery et al. 2022): N parameters without
position embeddings, an embedding that is not the head left out, L layers of width h, rows of s tokens.
Of MLM the head counts at all positions (`full`) or at those that are masked (`sparse`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf

MASKED_SHARE = 0.15
REAL_SHARE = 0.6
"""Mean length of a padded row; lengths are even between 0.2 and 1."""
_GPT2 = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
_BERT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}


@dataclass(frozen=True)
class Shape:
    """A model, the length of its rows, and where its ladder begins."""

    config: Any
    seq_len: int
    rows: int
    masked: bool = False
    """MLM, else causal."""

    def tiny(self) -> Shape:
        """For a trial on a CPU."""
        config = type(self.config)(**{**self.config.to_dict(), **self._small()})
        return Shape(config, 32, 4, self.masked)

    def _small(self) -> dict[str, int]:
        if self.config.model_type == "gpt2":
            return {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 512, "n_positions": 64}
        sizes = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
        return {**sizes, "vocab_size": 512, "num_key_value_heads": 2, "head_dim": 32}


SHAPES = {
    # 30 522 words, and rows up to a multiple of 64, as packages of kernels like them.
    "bert-base": Shape(hf.BertConfig(vocab_size=30528, **_BERT), 128, 256, masked=True),
    "gpt2": Shape(hf.GPT2Config(vocab_size=50304, **_GPT2), 1024, 16),
    "gpt-1.3b": Shape(
        hf.GPT2Config(vocab_size=50304, n_positions=2048, n_embd=2048, n_layer=24, n_head=16, **_GPT2), 2048, 4
    ),
    "llama-1b": Shape(
        hf.LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            tie_word_embeddings=True,
        ),
        2048,
        4,
    ),
}


def build(shape: Shape) -> Any:
    torch.manual_seed(0)
    kind = hf.AutoModelForMaskedLM if shape.masked else hf.AutoModelForCausalLM
    return kind.from_config(shape.config, dtype=torch.float32).train()


def flops_a_token(model: Any, shape: Shape) -> dict[str, float]:
    """`full`, and `sparse` of MLM."""
    config = model.config
    positions = sum(each.numel() for name, each in model.named_parameters() if "position" in name or ".wpe." in name)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    counted = sum(each.numel() for each in model.parameters()) - positions
    counted -= 0 if embedding is head else embedding.numel()
    attention = 12 * config.num_hidden_layers * config.hidden_size * shape.seq_len
    found = {"full": 6.0 * counted + attention}
    if shape.masked:
        in_head = sum(each.numel() for each in model.cls.parameters())
        found["sparse"] = found["full"] - 6.0 * in_head * (1 - MASKED_SHARE)
    return found


def batch(shape: Shape, rows: int, *, padded: bool, seed: int) -> tuple[dict[str, torch.Tensor], int]:
    """What a Hugging Face model takes, and the number of tokens that are not padding."""
    generator = torch.Generator().manual_seed(seed)
    length = shape.seq_len
    ids = torch.randint(5, shape.config.vocab_size, (rows, length), generator=generator)
    labels = ids.clone()
    if shape.masked:
        # As many in each row: the number of targets is that of the batch, always.
        scores = torch.rand(rows, length, generator=generator)
        chosen = scores.argsort(dim=1)[:, : max(1, round(MASKED_SHARE * length))]
        hidden = torch.ones_like(ids, dtype=torch.bool).scatter(1, chosen, False)
        labels[hidden] = -100
    if not padded:
        return {"input_ids": ids, "labels": labels}, ids.numel()
    lengths = torch.randint(int(0.2 * length), length + 1, (rows,), generator=generator)
    mask = torch.arange(length)[None] < lengths[:, None]
    labels[~mask] = -100
    ids[~mask] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask.long()}, int(mask.sum())
