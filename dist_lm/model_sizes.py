"""Named sizes of new models, by family.

Enters: a family and a size.  Leaves: fields of the Hugging Face config.
Promises: a size stands here only where somebody published it, and its source with it.

Sources.  bert, roberta: tiny to small are the BERT miniatures (Turc et al. 2019), base and large
Devlin et al. 2019 and Liu et al. 2019.  modernbert: base and large Warner et al. 2024; below, the
miniatures' shapes.  gpt2: base, large, 1b are the releases of 124M, 774M and 1.5B parameters (Radford
et al. 2019); below, the miniatures' shapes.  llama: base and large as SmolLM2-135M and -360M, 1b as
Llama-3.2-1B, 7b as Llama-2-7B; below, the miniatures' shapes.  t5: tiny and mini as T5-efficient
(Tay et al. 2021), small to large as T5 1.1, but with the output embeddings that transformers shares.
"""

from __future__ import annotations

from typing import Any

from dist_lm.errors import ConfigError

# Layers, hidden size, heads.
_MINIATURES = {"tiny": (2, 128, 2), "mini": (4, 256, 4), "small": (4, 512, 8)}
_BERTS = {**_MINIATURES, "base": (12, 768, 12), "large": (24, 1024, 16)}
_GPT2S = {**_MINIATURES, "base": (12, 768, 12), "large": (36, 1280, 20), "1b": (48, 1600, 25)}
# Layers, hidden size, heads, heads of keys and values, width of the feed-forward part.
_LLAMAS = {
    "tiny": (2, 128, 2, 2, 384),
    "mini": (4, 256, 4, 4, 768),
    "small": (4, 512, 8, 8, 1536),
    "base": (30, 576, 9, 3, 1536),
    "large": (32, 960, 15, 5, 2560),
    "1b": (16, 2048, 32, 8, 8192),
    "7b": (32, 4096, 32, 32, 11008),
}
_MODERNBERTS = {
    "tiny": (2, 128, 2, 192),
    "mini": (4, 256, 4, 384),
    "small": (4, 512, 8, 768),
    "base": (22, 768, 12, 1152),
    "large": (28, 1024, 16, 2624),
}
# Layers of each stack, width, width of the feed-forward part, heads; gated as in T5 1.1.
_T5S = {
    "tiny": (4, 256, 1024, 4, False),
    "mini": (4, 384, 1536, 8, False),
    "small": (8, 512, 1024, 6, True),
    "base": (12, 768, 2048, 12, True),
    "large": (24, 1024, 2816, 16, True),
}


def _encoder(shape: tuple[int, int, int]) -> dict[str, Any]:
    layers, hidden_size, heads = shape
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden_size,
    }


def _gpt2(shape: tuple[int, int, int]) -> dict[str, Any]:
    layers, hidden_size, heads = shape
    return {"num_hidden_layers": layers, "hidden_size": hidden_size, "num_attention_heads": heads}


def _llama(shape: tuple[int, int, int, int, int]) -> dict[str, Any]:
    layers, hidden_size, heads, key_value_heads, width = shape
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": width,
        # All but the largest share input and output embeddings, as their models do.
        "tie_word_embeddings": hidden_size < 4096,
    }


def _modernbert(shape: tuple[int, int, int, int]) -> dict[str, Any]:
    layers, hidden_size, heads, width = shape
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden_size,
        "num_attention_heads": heads,
        "intermediate_size": width,
    }


def _t5(shape: tuple[int, int, int, int, bool]) -> dict[str, Any]:
    layers, width, inner, heads, gated = shape
    return {
        "num_layers": layers,
        "d_model": width,
        "d_ff": inner,
        "num_heads": heads,
        "d_kv": 64,
        "feed_forward_proj": "gated-gelu" if gated else "relu",
    }


SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "bert": {size: _encoder(shape) for size, shape in _BERTS.items()},
    # As the releases: one kind of segment.
    "roberta": {size: {**_encoder(shape), "type_vocab_size": 1} for size, shape in _BERTS.items()},
    "modernbert": {size: _modernbert(shape) for size, shape in _MODERNBERTS.items()},
    "gpt2": {size: _gpt2(shape) for size, shape in _GPT2S.items()},
    "llama": {size: _llama(shape) for size, shape in _LLAMAS.items()},
    "t5": {size: _t5(shape) for size, shape in _T5S.items()},
}
POSITIONS = {"bert": 512, "roberta": 512, "modernbert": 8192, "gpt2": 1024, "llama": 2048}
"""Places that a model of the family has at least; T5's positions are relative."""


def size_fields(family: str, size: str) -> dict[str, Any]:
    """Raises ConfigError where the family has no such size."""
    sizes = SIZES[family]
    if size not in sizes:
        raise ConfigError(
            f"there is no {family} of size {size}",
            where="model.size",
            do=f"Use one of {', '.join(sizes)}, or write the shape into a config.json (model.config).",
        )
    return dict(sizes[size])
