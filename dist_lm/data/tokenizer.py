"""Train a tokenizer, or load one, and tell whether it is the one that a data set was made with.

Enters: texts, or the folder of a Hugging Face tokenizer.  Leaves: a Tokenizer, which turns texts
into token numbers without special tokens, and back.
Promises: the same texts and options give the same tokenizer, byte for byte; text that looks like a
special token ("[MASK]") is encoded as the text it is; loading needs neither transformers nor torch.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from dist_lm.data.location import redact
from dist_lm.data.vocabulary import CONFIG_FILE, RECIPES, TOKENIZER_FILE, save_folder
from dist_lm.disk import disk_errors
from dist_lm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dist_lm.data.manifest import Manifest

log = logging.getLogger(__name__)

SPECIAL_ROLES = {
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "mask_token": ("[MASK]", "<mask>"),
    "bos_token": ("<s>",),
    "eos_token": ("</s>", "<|endoftext|>"),
}
"""Role in the configuration file, and the texts it has where that file does not say."""
_MAP_FILE = "special_tokens_map.json"
_SMALLEST_VOCABULARY = {"wordpiece": 100, "bpe": 300, "t5": 400}
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
    special: Mapping[str, int]
    """Token numbers of the special tokens it has, by role: `eos_token` and so on."""
    sentinels: tuple[int, ...]
    """Token numbers of `<extra_id_0>`, `<extra_id_1>` and so on; empty where it has none."""
    continuation: NDArray[np.bool_]
    """[vocab_size]: the token continues the word that the token before it began."""
    _backend: tokenizers.Tokenizer = field(repr=False)

    def special_id(self, role: str, *, needed_for: str = "this task") -> int:
        """Number of a special token.  DataError where the tokenizer has none for that role."""
        if role not in self.special:
            raise DataError(
                f"the tokenizer has no {role}, which {needed_for} needs",
                where=str(self.path),
                why=f"It has {', '.join(self.special) or 'no special tokens'}.",
                do="Use the tokenizer of a model of that family, or train one: dist-lm tokenizer train --kind KIND.",
            )
        return self.special[role]

    @property
    def pad_id(self) -> int:
        """What fills rows up.  Never looked at: tokenizers of causal models often have none."""
        return self.special.get("pad_token", self.special.get("eos_token", 0))

    @property
    def cls_id(self) -> int:
        return self.special_id("cls_token")

    @property
    def sep_id(self) -> int:
        return self.special_id("sep_token")

    @property
    def mask_id(self) -> int:
        return self.special_id("mask_token")

    @property
    def eos_id(self) -> int:
        return self.special_id("eos_token")

    @property
    def separator_id(self) -> int:
        """What stands behind each document of a stream of tokens: eos, else sep."""
        return self.special["eos_token"] if "eos_token" in self.special else self.special_id("sep_token")

    @property
    def special_ids(self) -> tuple[int, ...]:
        """All special tokens, sentinels included; sorted."""
        return tuple(sorted({*self.special.values(), *self.sentinels}))

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Token text -> number, added tokens included."""
        return self._backend.get_vocab(with_added_tokens=True)

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
            if word is not None:
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

    def text_of(self, ids: Iterable[int]) -> str:
        """What a model has written, without special tokens."""
        return str(self._backend.decode([int(i) for i in ids], skip_special_tokens=True))

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
            do="Save it again with transformers (save_pretrained), or train one: dist-lm tokenizer train.",
        ) from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
    special, sentinels = _special_ids(path, vocabulary), _sentinels(vocabulary)
    return Tokenizer(
        path=path,
        sha256=_identity(spec),
        vocab_size=max(vocabulary.values()) + 1,
        special=special,
        sentinels=sentinels,
        continuation=_continuation(spec, vocabulary, {*special.values(), *sentinels}),
        _backend=backend,
    )


def compare_tokenizer(manifest: Manifest, tokenizer: Tokenizer, *, folder: str | Path | None = None) -> None:
    """DataError unless the data set was prepared with this tokenizer.  `folder` names it in the message."""
    if manifest.tokenizer_sha256 == tokenizer.sha256:
        return
    raise DataError(
        "the data set was prepared with another tokenizer",
        where=redact(folder) if folder is not None else "",
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
    lowercase: bool | None = None,
    model_max_length: int = 512,
    max_bytes: int | None = None,
) -> Tokenizer:
    """Train a tokenizer of a kind in vocabulary.RECIPES, and save it as a Hugging Face folder.

    Holds the texts in memory; `max_bytes` (of UTF-8) bounds them by a sample that depends on the
    texts alone, not on their order.  Little text gives fewer than `vocab_size` tokens.
    `lowercase` None: as the kind has it.
    """
    recipe = RECIPES.get(kind)
    if recipe is None:
        raise ConfigError(f"tokenizer kind '{kind}' is unknown", do=f"Use one of {', '.join(RECIPES)}.")
    smallest = _SMALLEST_VOCABULARY[kind]
    if vocab_size < smallest:
        raise ConfigError(
            f"a vocabulary of {vocab_size} tokens is too small",
            why="It must hold the special tokens and the letters or bytes, and still have room for words.",
            do=f"Ask for {smallest} tokens or more; 8192 suits 20 MB of text, 30522 is BERT's own.",
        )
    if (out / TOKENIZER_FILE).exists():
        raise ConfigError(
            "there is a tokenizer already",
            where=str(out),
            why="Data sets and models that were made with it would no longer fit it.",
            do="Use it as it is, choose another folder, or remove this one.",
        )
    chosen = list(texts) if max_bytes is None else _sample(texts, max_bytes)
    lower = recipe.lowercase if lowercase is None else lowercase
    backend = recipe.train(chosen, vocab_size, lower)
    save_folder(recipe, backend, out, lowercase=lower, longest=model_max_length)
    tokenizer = load_tokenizer(out)
    # transformers has been seen to drop a vocabulary in silence; a short one would make all text unknown.
    assert tokenizer.vocab_size == backend.get_vocab_size(), (tokenizer.vocab_size, backend.get_vocab_size())
    log.info("tokenizer %s: %d tokens from %d texts", out, tokenizer.vocab_size, len(chosen))
    return tokenizer


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


def _read_text(path: Path) -> str:
    if not path.is_file():
        why = f"{path.parent} is not a folder." if not path.parent.is_dir() else f"It has no {TOKENIZER_FILE}."
        if (path.parent / "vocab.txt").is_file():
            why += "  It has a vocab.txt, the form of older BERT models."
        raise DataError(
            "there is no tokenizer",
            where=str(path.parent),
            why=why,
            do="Train one (dist-lm tokenizer train), or give the folder of a Hugging Face tokenizer.",
        )
    with disk_errors(path, "read a tokenizer"):
        data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError("a tokenizer is not UTF-8 text", where=str(path), why=str(error)) from None


def _special_ids(folder: Path, vocabulary: dict[str, int]) -> dict[str, int]:
    """Token numbers by role.  A file may name a token by its text, or by an object with its flags."""
    said: dict[str, Any] = {}
    for path in (folder / _MAP_FILE, folder / CONFIG_FILE):
        if path.is_file():
            try:
                said |= json.loads(path.read_text("utf-8"))
            except ValueError as error:
                raise DataError("a tokenizer's configuration is not JSON", where=str(path), why=str(error)) from None
    found: dict[str, int] = {}
    missing = []
    for role, usual in SPECIAL_ROLES.items():
        value = said.get(role)
        name = value.get("content") if isinstance(value, dict) else value
        if name is None:
            name = next((text for text in usual if text in vocabulary), None)
        elif name not in vocabulary:
            missing.append(f"{role} '{name}'")
        if name in vocabulary:
            found[role] = vocabulary[name]
    if missing:
        raise DataError(
            "a tokenizer's configuration names special tokens that its vocabulary lacks",
            where=str(folder),
            why="Missing: " + ", ".join(missing) + ".",
            do="Save it again with transformers (save_pretrained).",
        )
    return found


def _sentinels(vocabulary: dict[str, int]) -> tuple[int, ...]:
    numbers = itertools.takewhile(
        lambda number: number is not None, (vocabulary.get(f"<extra_id_{place}>") for place in itertools.count())
    )
    return tuple(number for number in numbers if number is not None)


def _continuation(spec: dict[str, Any], vocabulary: dict[str, int], special_ids: set[int]) -> NDArray[np.bool_]:
    flags = np.zeros(max(vocabulary.values()) + 1, dtype=np.bool_)
    prefix = spec["model"].get("continuing_subword_prefix")
    pre_tokenizer = json.dumps(spec.get("pre_tokenizer"))
    starts = [start for name, start in _WORD_STARTS.items() if f'"{name}"' in pre_tokenizer]
    # Llama 2 and its kin put the mark in by a normaliser.
    if not starts and _WORD_STARTS["Metaspace"] in json.dumps(spec.get("normalizer"), ensure_ascii=False):
        starts = [_WORD_STARTS["Metaspace"]]
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
