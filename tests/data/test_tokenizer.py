"""Tokenizers of every kind: the same twice, the same in transformers, and named where they lack a token."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
from transformers import AutoTokenizer, GPT2Tokenizer, LlamaTokenizer, T5Tokenizer

from dist_lm.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from dist_lm.errors import ConfigError, DataError, EnvironmentFault

pytestmark = pytest.mark.fast
TEXTS = [topics[name] for name in sorted(topics)][:40]
KINDS = {"wordpiece": 600, "bpe": 600, "t5": 700}
SAMPLE = "The raise statement  re-raises:\n\tTypeError('caf\u00e9 \u4e2d') </s><extra_id_0>[MASK]<|endoftext|>"
AGAIN = """
import sys
from pathlib import Path
from tests.data.test_tokenizer import KINDS, TEXTS
from dist_lm.data.tokenizer import train_tokenizer
for kind, size in KINDS.items():
    train_tokenizer(TEXTS, vocab_size=size, kind=kind, out=Path(sys.argv[1]) / kind)
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: train_tokenizer(TEXTS, vocab_size=size, kind=kind, out=root / kind) for kind, size in KINDS.items()}


def test_another_process_trains_the_same_files(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    root = Path(__file__).resolve().parent.parent.parent
    subprocess.run([sys.executable, "-c", AGAIN, str(tmp_path)], cwd=root, check=True, timeout=120)
    for kind, tokenizer in trained.items():
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tokenizer.path / name).read_bytes() == (tmp_path / kind / name).read_bytes(), (kind, name)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_gives_the_same_numbers_and_special_tokens(trained: dict[str, Tokenizer], kind: str) -> None:
    ours = trained[kind]
    theirs = AutoTokenizer.from_pretrained(ours.path, local_files_only=True)
    assert ours.vocab_size == len(theirs) == KINDS[kind]
    plain = "The raise statement  re-raises:\n\tTypeError('caf\u00e9 \u4e2d')"
    assert ours.encode_batch([plain]) == [theirs(plain, add_special_tokens=False)["input_ids"]]
    for role, number in ours.special.items():
        assert theirs.convert_tokens_to_ids(getattr(theirs, role)) == number, role


def test_the_kinds_have_the_special_tokens_of_their_models(trained: dict[str, Tokenizer]) -> None:
    assert {"cls_token", "sep_token", "mask_token", "pad_token", "unk_token"} <= set(trained["wordpiece"].special)
    assert {"bos_token", "eos_token", "pad_token"} <= set(trained["bpe"].special)
    assert trained["bpe"].separator_id == trained["bpe"].eos_id != trained["bpe"].pad_id
    t5 = trained["t5"]
    assert (t5.pad_id, t5.eos_id) == (0, 1)
    assert t5.sentinels == tuple(range(t5.vocab_size - 1, t5.vocab_size - 101, -1))
    as_model_input = AutoTokenizer.from_pretrained(t5.path, local_files_only=True)("def")["input_ids"]
    assert as_model_input[-1] == t5.eos_id


@pytest.mark.parametrize("kind", ["bpe", "t5"])
def test_byte_level_kinds_lose_nothing(trained: dict[str, Tokenizer], kind: str) -> None:
    tokenizer = trained[kind]
    (ids,) = tokenizer.encode_batch([SAMPLE])
    assert tokenizer.decode(ids) == SAMPLE


@pytest.mark.parametrize("kind", KINDS)
def test_text_that_looks_like_a_special_token_is_text(trained: dict[str, Tokenizer], kind: str) -> None:
    (ids,) = trained[kind].encode_batch([SAMPLE])
    assert not {*ids} & {*trained[kind].special_ids} - {trained[kind].special.get("unk_token")}


def test_tokenizers_of_gpt2_llama_and_t5_load(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    spec = json.loads((trained["bpe"].path / "tokenizer.json").read_text())["model"]
    merges = [tuple(pair) for pair in spec["merges"]]
    GPT2Tokenizer(vocab=spec["vocab"], merges=merges).save_pretrained(tmp_path / "gpt2")
    pieces = ["\u2581the", "\u2581", *"thernow"]
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{piece: 3 + at for at, piece in enumerate(dict.fromkeys(pieces))}}
    LlamaTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path / "llama")
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -2.0) for piece in dict.fromkeys(pieces))]
    T5Tokenizer(vocab=scores).save_pretrained(tmp_path / "t5")
    gpt2, llama, t5 = (load_tokenizer(tmp_path / name) for name in ("gpt2", "llama", "t5"))
    assert gpt2.encode_batch([TEXTS[0]]) == trained["bpe"].encode_batch([TEXTS[0]])
    assert gpt2.eos_id == gpt2.special["bos_token"] == trained["bpe"].eos_id
    # Real GPT-2 has no padding token; rows are filled up with what no one looks at.
    assert "pad_token" not in gpt2.special
    assert gpt2.pad_id == gpt2.eos_id
    assert (llama.special["bos_token"], llama.eos_id) == (1, 2)
    assert llama.continuation[llama.vocabulary["t"]]
    assert not llama.continuation[llama.vocabulary["\u2581the"]]
    assert len(t5.sentinels) == 100
    assert t5.decode(t5.encode_batch(["the one"])[0]).strip() == "the one"


def test_words_begin_where_the_marks_of_the_kind_say(trained: dict[str, Tokenizer]) -> None:
    for kind, text in (("wordpiece", "statement"), ("bpe", " statement"), ("t5", " statement")):
        (ids,) = trained[kind].encode_batch([text + "ulations"])
        flags = trained[kind].continuation[np.array(ids)]
        assert not flags[0]
        assert flags[1:].all()
        assert len(ids) > 1


def test_a_role_that_a_tokenizer_lacks_is_named(trained: dict[str, Tokenizer]) -> None:
    with pytest.raises(DataError, match="the tokenizer has no mask_token") as caught:
        _ = trained["bpe"].mask_id
    assert "eos_token" in str(caught.value)


def test_a_configuration_that_names_an_unknown_token_is_refused(trained: dict[str, Tokenizer], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((trained["bpe"].path / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    with pytest.raises(DataError, match="vocabulary lacks") as caught:
        load_tokenizer(tmp_path)
    assert "eos_token '<stop>'" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "unigram", "vocab_size": 500}, "'unigram' is unknown"),
        ({"kind": "bpe", "vocab_size": 299}, "too small"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        train_tokenizer(TEXTS, out=tmp_path, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no text"):
        train_tokenizer([" \n"], vocab_size=700, kind=kind, out=tmp_path)


def test_a_tokenizer_is_never_trained_over(trained: dict[str, Tokenizer]) -> None:
    before = (trained["bpe"].path / "tokenizer.json").read_bytes()
    with pytest.raises(ConfigError, match="there is a tokenizer already"):
        train_tokenizer(TEXTS, vocab_size=600, kind="bpe", out=trained["bpe"].path)
    assert (trained["bpe"].path / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("file", "content", "what"),
    [
        ("tokenizer.json", b'{"model": {"type": "Magic"}}', "a tokenizer cannot be read"),
        ("tokenizer.json", b"\xff\xfe", "a tokenizer is not UTF-8 text"),
        ("tokenizer_config.json", b"{", "a tokenizer's configuration is not JSON"),
    ],
)
def test_a_damaged_file_of_a_tokenizer_is_named(
    trained: dict[str, Tokenizer], file: str, content: bytes, what: str, tmp_path: Path
) -> None:
    (tmp_path / "tokenizer.json").write_bytes((trained["bpe"].path / "tokenizer.json").read_bytes())
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.what == what
    assert caught.value.where == str(tmp_path / file)


def test_a_full_disk_leaves_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "tokenizer.json").symlink_to("/dev/full")
    (tmp_path / ".tokenizer.tmp").symlink_to(tmp_path / "full")
    with pytest.raises(EnvironmentFault, match="cannot write a tokenizer") as caught:
        train_tokenizer(TEXTS, vocab_size=600, kind="bpe", out=tmp_path)
    assert "No space left" in caught.value.why
    assert not (tmp_path / "tokenizer.json").exists()
