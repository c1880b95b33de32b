"""Train a tokenizer, or load one, and tell whether it is the one that a data set was made with.

Enters: texts, or the folder of a Hugging Face tokenizer.  Leaves: a Tokenizer, which turns texts
into token numbers without special tokens, and back.
Promises: the same texts and options give the same tokenizer, byte for byte; text that looks like a
special token ("[MASK]") is encoded as the text it is; loading needs neither transformers nor torch.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from numpy.typing import NDArray
from tokenizers import models, normalizers, pre_tokenizers, trainers

from dist_lm.disk import disk_errors
from dist_lm.errors import ConfigError, DataError, EnvironmentFault

if TYPE_CHECKING:
    from dist_lm.data.manifest import Manifest

log = logging.getLogger(__name__)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
# Role in the configuration file, and the text it has where that file does not say.
_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
_CONTINUING = "##"
_MOST_CHARACTERS = 1000
_SMALLEST_VOCABULARY = 100
# The first token of a word begins with this in byte-level BPE, and with that in SentencePiece style.
_WORD_STARTS = {"ByteLevel": "\u0120", "Metaspace": "\u2581"}


@dataclass(frozen=True)
class Frame:
    """Special tokens of a model input: prefix, first text, middle, second text, suffix."""

    prefix: tuple[int, ...]
    middle: tuple[int, ...]
    suffix: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A Hugging Face tokenizer as dist_lm uses it: its Rust part, and what the tasks need to know."""

    path: Path
    sha256: str
    """Hash of the parts of tokenizer.json that decide the token numbers.  Layout, padding and
    truncation settings do not count: transformers rewrites those whenever it saves."""
    vocab_size: int
    """One more than the highest token number."""
    pad_id: int
    unk_id: int
    cls_id: int
    sep_id: int
    mask_id: int
    continuation: NDArray[np.bool_]
    """[vocab_size]: the token continues the word that the token before it began."""
    _backend: tokenizers.Tokenizer = field(repr=False)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token numbers of each text; no special tokens are added, none is recognised in the text."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encodings(self, texts: Sequence[str]) -> list[tokenizers.Encoding]:
        """Token numbers and character offsets of each text; special tokens as in `encode_batch`."""
        return self._backend.encode_batch(list(texts), add_special_tokens=False)

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Token numbers of each word of one text that is split into words already."""
        encoding = self._backend.encode(list(words), is_pretokenized=True, add_special_tokens=False)
        pieces: list[list[int]] = [[] for _ in words]
        for number, word in zip(encoding.ids, encoding.word_ids, strict=True):
            pieces[word].append(number)
        return pieces

    def encode_template(self, text: str) -> list[int]:
        """Token numbers of text that dist_lm or a chat template wrote: here special tokens are special."""
        self._backend.encode_special_tokens = False
        try:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return ids
        finally:
            self._backend.encode_special_tokens = True

    def frame(self, *, pair: bool = False) -> Frame:
        """The special tokens that this tokenizer puts around one text, or around two."""
        encoding = self._backend.encode("a", "a" if pair else None, add_special_tokens=True)
        begins = [place for place, part in enumerate(encoding.sequence_ids) if part == 0]
        others = [place for place, part in enumerate(encoding.sequence_ids) if part == 1]
        ids, last = encoding.ids, (others or begins)[-1] + 1
        middle = ids[begins[-1] + 1 : others[0]] if pair else []
        return Frame(tuple(ids[: begins[0]]), tuple(middle), tuple(ids[last:]))

    def decode(self, ids: Iterable[int]) -> str:
        """Readable text; special tokens are shown."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=False))


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder (tokenizer.json, and tokenizer_config.json if there is one)."""
    spec_path = path / TOKENIZER_FILE
    text = _read_text(spec_path)
    try:
        spec = json.loads(text)
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the Rust side raises plain Exception
        raise DataError(
            "a tokenizer cannot be read",
            where=str(spec_path),
            why=str(error),
            do="Save it again with transformers (save_pretrained), or train one: dist-lm data tokenizer.",
        ) from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    special = _special_ids(path, vocabulary)
    return Tokenizer(
        path=path,
        sha256=_identity(spec),
        vocab_size=max(vocabulary.values()) + 1,
        pad_id=special["pad_token"],
        unk_id=special["unk_token"],
        cls_id=special["cls_token"],
        sep_id=special["sep_token"],
        mask_id=special["mask_token"],
        continuation=_continuation(spec, vocabulary, set(special.values())),
        _backend=backend,
    )


def compare_tokenizer(manifest: Manifest, tokenizer: Tokenizer, *, folder: Path | None = None) -> None:
    """DataError unless the data set was prepared with this tokenizer.  `folder` names it in the message."""
    if manifest.tokenizer_sha256 == tokenizer.sha256:
        return
    raise DataError(
        "the data set was prepared with another tokenizer",
        where=str(folder) if folder is not None else "",
        why=f"{tokenizer.path}: {tokenizer.sha256[:16]}, {tokenizer.vocab_size} tokens; "
        f"data set: {manifest.tokenizer_sha256[:16]}, {manifest.vocab_size} tokens.",
        do="Give the tokenizer it was prepared with, or prepare the data again with this one.",
    )


def train_tokenizer(
    texts: Iterable[str],
    *,
    vocab_size: int,
    out: Path,
    kind: str = "wordpiece",
    lowercase: bool = True,
    model_max_length: int = 512,
    max_bytes: int | None = None,
) -> Tokenizer:
    """Train a WordPiece tokenizer as BERT has it, and save it as a Hugging Face folder.

    Holds the texts in memory; `max_bytes` (of UTF-8) bounds them by a sample that depends on the
    texts alone, not on their order.  Little text gives fewer than `vocab_size` tokens.
    """
    if kind != "wordpiece":
        raise ConfigError(f"tokenizer kind '{kind}' is unknown", do="Use 'wordpiece'.")
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ConfigError(
            f"a vocabulary of {vocab_size} tokens is too small",
            why="It must hold the special tokens and the letters, and still have room for words.",
            do=f"Ask for {_SMALLEST_VOCABULARY} tokens or more; 8192 suits 20 MB of text, 30522 is BERT's own.",
        )
    if (out / TOKENIZER_FILE).exists():
        raise ConfigError(
            "there is a tokenizer already",
            where=str(out),
            why="Data sets and models that were made with it would no longer fit it.",
            do="Use it as it is, choose another folder, or remove this one.",
        )
    chosen = list(texts) if max_bytes is None else _sample(texts, max_bytes)
    vocabulary = _train_wordpiece(chosen, vocab_size, lowercase)
    _save_as_bert(vocabulary, out, lowercase=lowercase, model_max_length=model_max_length)
    tokenizer = load_tokenizer(out)
    # transformers has been seen to drop a vocabulary in silence; a short one would make all text unknown.
    assert tokenizer.vocab_size == len(vocabulary), (tokenizer.vocab_size, len(vocabulary))
    log.info("tokenizer %s: %d tokens from %d texts", out, tokenizer.vocab_size, len(chosen))
    return tokenizer


def _train_wordpiece(texts: list[str], vocab_size: int, lowercase: bool) -> dict[str, int]:
    normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters = _letters(texts, normalizer, at_most=min(_MOST_CHARACTERS, vocab_size // 8))
    if not letters:
        raise DataError("there is no text to train a tokenizer on", do="Look at the inputs.")
    inner = [letter for letter in letters if len(pre_tokenizer.pre_tokenize_str("a" + letter)) == 1]
    # The trainer numbers single letters in the order in which it meets them in a randomly seeded hash
    # table, and breaks ties between merges by these numbers: two runs would differ.  Numbering all
    # letters beforehand, as if they were special tokens, leaves nothing to chance.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[*_SPECIAL_TOKENS.values(), *letters, *(_CONTINUING + letter for letter in inner)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        show_progress=False,
    )
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token=_SPECIAL_TOKENS["unk_token"]))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer
    backend.train_from_iterator(texts, trainer, length=len(texts))
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=False)
    return dict(sorted(vocabulary.items(), key=lambda item: item[1]))


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
    return sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:at_most])


def _sample(texts: Iterable[str], max_bytes: int) -> list[str]:
    """The texts with the smallest hashes that fit into `max_bytes` together."""
    kept: list[tuple[int, str]] = []
    kept_bytes = 0
    for text in texts:
        encoded = text.encode("utf-8")
        rank = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "big")
        heapq.heappush(kept, (-rank, text))
        kept_bytes += len(encoded)
        while kept_bytes > max_bytes and len(kept) > 1:
            kept_bytes -= len(heapq.heappop(kept)[1].encode("utf-8"))
    return [text for _, text in sorted(kept, reverse=True)]


def _save_as_bert(vocabulary: dict[str, int], out: Path, *, lowercase: bool, model_max_length: int) -> None:
    # Saved as BertTokenizer: the generic class would come back without token_type_ids.
    from transformers import BertTokenizer

    temporary = out / ".tokenizer.tmp"
    with disk_errors(out, "write a tokenizer"):
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        tokenizer = BertTokenizer(vocab=vocabulary, do_lower_case=lowercase, model_max_length=model_max_length)
        try:
            tokenizer.save_pretrained(str(temporary))
        except Exception as error:  # the Rust side raises plain Exception
            if isinstance(error, OSError) or "os error" not in str(error):
                raise
            raise EnvironmentFault("cannot write a tokenizer", where=str(out), why=str(error)) from error
        # tokenizer.json last: without it the folder is not a tokenizer.
        for name in (CONFIG_FILE, TOKENIZER_FILE):
            with open(temporary / name, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary / name, out / name)
        shutil.rmtree(temporary)


def _read_text(path: Path) -> str:
    if not path.is_file():
        why = f"{path.parent} is not a folder." if not path.parent.is_dir() else f"It has no {TOKENIZER_FILE}."
        if (path.parent / "vocab.txt").is_file():
            why += "  It has a vocab.txt, the form of older BERT models."
        raise DataError(
            "there is no tokenizer",
            where=str(path.parent),
            why=why,
            do="Train one (dist-lm data tokenizer), or give the folder of a Hugging Face tokenizer.",
        )
    with disk_errors(path, "read a tokenizer"):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("a tokenizer is not UTF-8 text", where=str(path), why=str(error)) from None


def _special_ids(folder: Path, vocabulary: dict[str, int]) -> dict[str, int]:
    names = dict(_SPECIAL_TOKENS)
    config_path = folder / CONFIG_FILE
    if config_path.is_file():
        try:
            config = json.loads(config_path.read_text("utf-8"))
        except ValueError as error:
            raise DataError("a tokenizer's configuration is not JSON", where=str(config_path), why=str(error)) from None
        for role in names:
            value = config.get(role)
            # Older files write a token as an object with its flags.
            names[role] = value["content"] if isinstance(value, dict) else value or names[role]
    missing = [f"{role} '{name}'" for role, name in names.items() if name not in vocabulary]
    if missing:
        raise DataError(
            "a tokenizer lacks special tokens that the tasks need",
            where=str(folder),
            why="Missing: " + ", ".join(missing) + ".",
            do="Use the tokenizer of an encoder model such as BERT, or train one: dist-lm data tokenizer.",
        )
    return {role: vocabulary[name] for role, name in names.items()}


def _continuation(spec: dict[str, Any], vocabulary: dict[str, int], special_ids: set[int]) -> NDArray[np.bool_]:
    flags = np.zeros(max(vocabulary.values()) + 1, dtype=np.bool_)
    prefix = spec["model"].get("continuing_subword_prefix")
    pre_tokenizer = json.dumps(spec.get("pre_tokenizer"))
    starts = [start for name, start in _WORD_STARTS.items() if f'"{name}"' in pre_tokenizer]
    for token, number in vocabulary.items():
        if number not in special_ids:
            if prefix:
                flags[number] = token.startswith(prefix)
            elif starts:
                flags[number] = not token.startswith(starts[0])
    return flags


def _identity(spec: dict[str, Any]) -> str:
    decisive = {key: spec.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")}
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode("ascii")).hexdigest()
