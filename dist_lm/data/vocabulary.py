"""Vocabularies learned from text, and the Hugging Face folders that hold them.

Enters: texts.  Leaves: tokenizer.json and tokenizer_config.json that plain AutoTokenizer loads with
the right special tokens.
Promises: the same texts and options give the same files, byte for byte.  (The Unigram trainer of the
tokenizers library does not: it sums in the order of a randomly seeded hash table.  So the tokenizer
for T5 models is a byte-level BPE with T5's special tokens, as CodeT5 has it.)
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from dist_lm.disk import disk_errors
from dist_lm.errors import DataError, EnvironmentFault

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
NUM_SENTINELS = 100
"""`<extra_id_0>` .. `<extra_id_99>`, as every T5 has them."""
_CONTINUING = "##"
_MOST_CHARACTERS = 1000
_BERT = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_END_OF_TEXT, _GPT_PAD = "<|endoftext|>", "<|pad|>"
_T5 = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Recipe:
    """How one kind of tokenizer is trained and saved."""

    train: Callable[[list[str], int, bool], tokenizers.Tokenizer]
    """(texts, vocabulary size, lower case) -> backend."""
    wrap: Callable[[tokenizers.Tokenizer, bool, int], Any]
    """(backend, lower case, longest input) -> tokenizer of transformers."""
    lowercase: bool
    """Whether text is lower-cased unless somebody says otherwise."""


def save_folder(recipe: Recipe, backend: tokenizers.Tokenizer, out: Path, *, lowercase: bool, longest: int) -> None:
    """Write a Hugging Face folder; tokenizer.json last: without it the folder is not a tokenizer."""
    temporary = out / ".tokenizer.tmp"
    with disk_errors(out, "write a tokenizer"):
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer = recipe.wrap(backend, lowercase, longest)
        try:
            tokenizer.save_pretrained(str(temporary))
        except Exception as error:  # the Rust side raises plain Exception
            if isinstance(error, OSError) or "os error" not in str(error):
                raise
            raise EnvironmentFault("cannot write a tokenizer", where=str(out), why=str(error)) from error
        for name in (CONFIG_FILE, TOKENIZER_FILE):
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary / name, out / name)
        shutil.rmtree(temporary)


def _train_wordpiece(texts: list[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = _letters(texts, normalizer, at_most=min(_MOST_CHARACTERS, vocab_size // 8))
    inner = [letter for letter in letters if len(pre_tokenizer.pre_tokenize_str("a" + letter)) == 1]
    # The trainer numbers single letters in the order in which it meets them in a randomly seeded hash
    # table, and breaks ties between merges by these numbers: two runs would differ.  Numbering all
    # letters beforehand, as if they were special tokens, leaves nothing to chance.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*_BERT, *letters, *(_CONTINUING + letter for letter in inner)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(texts, trainer, length=len(texts))
    return backend


def _letters(texts: list[str], normalizer: normalizers.Normalizer, *, at_most: int) -> list[str]:
    """The most frequent characters of the normalised texts, sorted; words with others become unknown."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(text)
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for letter in normalizer.normalize_str(character):
            if not letter.isspace():
                counts[letter] += count
    if not counts:
        raise no_text()
    return sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:at_most])


def no_text() -> DataError:
    return DataError("there is no text to train a tokenizer on", do="Look at the inputs.")


def _train_bytes(texts: list[str], vocab_size: int, lowercase: bool, special: tuple[str, ...]) -> tokenizers.Tokenizer:
    if not any(text.strip() for text in texts):
        raise no_text()
    backend = tokenizers.Tokenizer(models.BPE())
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    # Merges of one count are taken in the order of their numbers, and all 256 letters are numbered
    # beforehand: nothing is left to chance.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer, length=len(texts))
    return backend


def _train_gpt(texts: list[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    return _train_bytes(texts, vocab_size, lowercase, (_END_OF_TEXT, _GPT_PAD))


def _train_t5(texts: list[str], vocab_size: int, lowercase: bool) -> tokenizers.Tokenizer:
    backend = _train_bytes(texts, vocab_size - NUM_SENTINELS, lowercase, _T5)
    # As in T5: sentinels stand at the end of the vocabulary, the first one last.
    sentinels = [f"<extra_id_{number}>" for number in range(NUM_SENTINELS)]
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in reversed(sentinels)])
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", _T5.index("</s>"))]
    )
    return backend


def _as_bert(backend: tokenizers.Tokenizer, lowercase: bool, longest: int) -> Any:
    # Saved as BertTokenizer: the generic class would come back without token_type_ids.
    from transformers import BertTokenizer

    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    in_order = dict(sorted(vocabulary.items(), key=lambda item: item[1]))
    return BertTokenizer(vocab=in_order, do_lower_case=lowercase, model_max_length=longest)


def _as_gpt2(backend: tokenizers.Tokenizer, lowercase: bool, longest: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=_END_OF_TEXT,
        eos_token=_END_OF_TEXT,
        unk_token=_END_OF_TEXT,
        pad_token=_GPT_PAD,
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


def _as_t5(backend: tokenizers.Tokenizer, lowercase: bool, longest: int) -> Any:
    # The generic class: T5Tokenizer would build a Unigram model out of the vocabulary.
    from transformers import PreTrainedTokenizerFast

    pad, eos, unk = _T5
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=pad,
        eos_token=eos,
        unk_token=unk,
        additional_special_tokens=[f"<extra_id_{number}>" for number in range(NUM_SENTINELS)],
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )


RECIPES: dict[str, Recipe] = {
    "wordpiece": Recipe(_train_wordpiece, _as_bert, lowercase=True),
    "bpe": Recipe(_train_gpt, _as_gpt2, lowercase=False),
    "t5": Recipe(_train_t5, _as_t5, lowercase=False),
}
"""By the name that a user gives: BERT's WordPiece, GPT-2's byte-level BPE, and that with T5's special tokens."""
