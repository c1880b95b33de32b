"""Features of fine-tuning data, beside those that Hugging Face's example scripts make."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from dist_lm.data.kinds.base import Unusable
from dist_lm.data.kinds.chat import load_template
from dist_lm.data.kinds.question_answering import context_windows
from dist_lm.data.kinds.registry import kind_named
from dist_lm.data.tokenizer import Tokenizer, load_tokenizer
from dist_lm.errors import ConfigError, DataError
from tests.tasks.prepared_rows import packed, rules_of

pytestmark = pytest.mark.fast
SENTENCES = [
    (["The", "import", "statement", "of", "Python's", "grammar"], ["O", "B-X", "I-X", "O", "B-Y", "I-Y"]),
    (["Unforeseeable", "exceptions", "propagate"], ["B-X", "B-X", "O"]),
]
CONTEXT = (
    "The with statement is used to wrap the execution of a block with methods defined by a context manager. "
    "This allows common try, except, finally usage patterns to be encapsulated for convenient reuse. "
) * 2


@pytest.fixture(scope="module")
def tokenizer(topics_data: Path) -> Tokenizer:
    return load_tokenizer(topics_data / "tokenizer")


@pytest.fixture(scope="module")
def fast(topics_data: Path) -> Any:
    return AutoTokenizer.from_pretrained(topics_data / "tokenizer", local_files_only=True)


@pytest.mark.parametrize("all_tokens", [False, True])
def test_tags_stand_where_run_ner_puts_them(tokenizer: Tokenizer, fast: Any, all_tokens: bool) -> None:
    records = [{"tokens": words, "tags": tags} for words, tags in SENTENCES]
    part = packed("token_classification", records, tokenizer, rules_of(64))
    for row, (words, tags) in enumerate(SENTENCES):
        # run_ner.py, tokenize_and_align_labels.
        theirs = fast(words, is_split_into_words=True, truncation=True, max_length=64)
        expected, previous = [], None
        for word in theirs.word_ids():
            if word is None or (word == previous and not all_tokens):
                expected.append(None)
            else:
                expected.append(tags[word])
            previous = word
        length = part.columns["length"][row]
        assert part.columns["tokens"][row][:length].tolist() == theirs["input_ids"]
        starts = part.columns["word_start"][row][:length]
        word_of = np.cumsum(starts, dtype=np.int64) - 1
        carries = (word_of >= 0) & (np.arange(length) < length - 1) if all_tokens else starts > 0
        ours = [
            part.labels[part.columns["tag"][row][word_of[place]]] if carries[place] else None for place in range(length)
        ]
        assert ours == expected


def test_a_long_text_is_parted_between_words_and_none_is_lost(tokenizer: Tokenizer) -> None:
    words = [word for sentence, _ in SENTENCES for word in sentence] * 5
    tags = [tag for _, tags in SENTENCES for tag in tags] * 5
    part = packed("token_classification", [{"tokens": words, "tags": tags}], tokenizer, rules_of(24))
    assert len(part.document) > 3
    assert part.ordinal.tolist() == list(range(len(part.document)))
    seen = [
        part.labels[number]
        for tag, count in zip(part.columns["tag"], part.columns["num_words"], strict=True)
        for number in tag[:count]
    ]
    assert seen == tags
    assert (part.columns["word_start"].sum(axis=1) == part.columns["num_words"]).all()
    assert not part.lost.any()


def test_a_word_longer_than_a_row_is_cut_and_counted(tokenizer: Tokenizer) -> None:
    part = packed("token_classification", [{"tokens": ["x7" * 40], "tags": ["O"]}], tokenizer, rules_of(16))
    pieces = len(tokenizer.encode_words(["x7" * 40])[0])
    assert part.lost.tolist() == [[0, 0, 1, pieces - 14]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"tokens": ["a", "b"], "tags": ["O"]}, "1 tags for 2 tokens"),
        ({"tokens": ["a", "b"], "tags": ["O", "I-PER"]}, "tag 1 `I-PER` follows `O`"),
        ({"tokens": ["a", "b"], "tags": ["B-LOC", "I-PER"]}, "tag 1 `I-PER` follows `B-LOC`"),
        ({"tokens": ["a", "b"], "tags": ["B-LOC", "PER"]}, "tag 1 `PER` is not of IOB2"),
        ({"tokens": "a b", "tags": ["O", "O"]}, "'tokens' is not a list"),
        ({"tokens": ["a"], "tags": [3]}, "'tags' is not a list of names"),
        ({"tokens": [], "tags": []}, "'tokens' is empty"),
    ],
)
def test_tags_that_cannot_be_used_say_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        kind_named("token_classification").clean(record, rules_of(16))


def test_parts_of_speech_need_no_iob2() -> None:
    record = {"tokens": ["a", "cat"], "tags": ["DET", "NOUN"]}
    assert kind_named("token_classification").clean(record, rules_of(16)) == record


def _question(start: int | None = None, answer: str = "a context manager") -> dict[str, Any]:
    at = CONTEXT.index(answer) if start is None else start
    return {
        "id": "q1",
        "question": " What defines the methods?",
        "context": CONTEXT,
        "answers": {"text": [answer], "answer_start": [at]},
    }


@pytest.mark.parametrize("answer", ["a context manager", "convenient reuse", "The with statement", "common try"])
@pytest.mark.parametrize(("seq_len", "stride"), [(48, 16), (32, 8), (256, 64)])
def test_windows_and_answers_are_those_of_run_qa(
    tokenizer: Tokenizer, fast: Any, seq_len: int, stride: int, answer: str
) -> None:
    record = _question(answer=answer)
    part = packed("question_answering", [record], tokenizer, rules_of(seq_len, doc_stride=stride))
    # run_qa.py, prepare_train_features, for one example.
    theirs = fast(
        record["question"].lstrip(),
        record["context"],
        truncation="only_second",
        max_length=seq_len,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    assert len(part.document) == len(theirs["input_ids"])
    start_char = record["answers"]["answer_start"][0]
    end_char = start_char + len(answer)
    for row, offsets in enumerate(theirs["offset_mapping"]):
        ids, sequence_ids = theirs["input_ids"][row], theirs.sequence_ids(row)
        first = sequence_ids.index(1)
        last = len(ids) - 1 - sequence_ids[::-1].index(1)
        start = end = ids.index(fast.cls_token_id)
        if offsets[first][0] <= start_char and offsets[last][1] >= end_char:
            while first < len(offsets) and offsets[first][0] <= start_char:
                first += 1
            start = first - 1
            while offsets[last][1] >= end_char:
                last -= 1
            end = last + 1
        length = part.columns["length"][row]
        assert part.columns["tokens"][row][:length].tolist() == ids
        assert (part.columns["start"][row], part.columns["end"][row]) == (start, end)
        segments = (np.arange(length) >= part.columns["second_begin"][row]).astype(int).tolist()
        assert segments == theirs["token_type_ids"][row]


def test_windows_know_the_characters_of_their_tokens(tokenizer: Tokenizer) -> None:
    windows = context_windows("what?", CONTEXT, tokenizer, 48, 16)
    for window in windows:
        for place, (start, end) in enumerate(window.offsets):
            token = tokenizer.decode([window.ids[window.second_begin + place]])
            assert token.removeprefix("##") == CONTEXT[start:end].lower()
    assert windows[-1].offsets[-1][1] == len(CONTEXT.rstrip())


def test_an_answer_elsewhere_is_refused_with_the_place(tokenizer: Tokenizer) -> None:
    kind = kind_named("question_answering")
    at = CONTEXT.index("a context manager")
    with pytest.raises(Unusable, match=f"is not at character 3 of its context: it is at character {at}"):
        kind.clean(_question(start=3), rules_of(64))
    with pytest.raises(Unusable, match="it is nowhere in it"):
        kind.clean(_question(start=3, answer="a decorator"), rules_of(64))


def test_a_question_without_answer_points_at_the_first_token(tokenizer: Tokenizer) -> None:
    record = {**_question(), "answers": []}
    part = packed("question_answering", [record], tokenizer, rules_of(48, doc_stride=8))
    assert not part.columns["start"].any()
    assert not part.columns["end"].any()


def test_a_question_that_leaves_no_room_is_counted(tokenizer: Tokenizer) -> None:
    record = {**_question(), "question": "why " * 40}
    part = packed("question_answering", [record], tokenizer, rules_of(32, doc_stride=8))
    assert len(part.document) == 0
    assert part.lost[0].tolist() == [1, 0, 0, 0]


def test_sources_and_targets_are_those_of_run_translation(tokenizer: Tokenizer, fast: Any) -> None:
    records = [{"source": "the lambda form", "target": "die anonyme Funktion " * 20}, {"source": "b", "target": "c"}]
    part = packed("seq2seq", records, tokenizer, rules_of(32, prefix="translate: ", target_len=16))
    theirs = fast(["translate: " + record["source"] for record in records], max_length=32, truncation=True)
    targets = fast(text_target=[record["target"] for record in records], max_length=16, truncation=True)
    for name, expected in (("source", theirs), ("target", targets)):
        rows = zip(part.columns[name], part.columns[f"{name}_length"], strict=True)
        assert [row[:length].tolist() for row, length in rows] == expected["input_ids"]
    whole = len(fast(text_target=records[0]["target"])["input_ids"])
    assert part.lost.tolist() == [[0, 0, 1, whole - 16], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("question_answering", {"doc_stride": 40}), ("seq2seq", {"target_len": 2}), ("instruction", {"doc_stride": 3})],
)
def test_options_that_cannot_be_are_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        kind_named(kind).check_rules(rules_of(64, **options))


def test_dialogues_fill_rows_best_first_and_none_is_parted(tokenizer: Tokenizer) -> None:
    records = [{"prompt": "name " * (3 + number % 7), "response": "import " * (1 + number % 5)} for number in range(40)]
    part = packed("instruction", records, tokenizer, rules_of(64))
    alone = [packed("instruction", [record], tokenizer, rules_of(64)) for record in records]
    sizes = [int(one.columns["length"][0]) for one in alone]
    assert int(part.columns["length"].sum()) == sum(sizes)
    pieces = []
    for row, length in enumerate(part.columns["length"]):
        segments = part.columns["segment"][row][:length]
        for segment in range(1, segments.max() + 1):
            places = np.flatnonzero(segments == segment)
            assert (np.diff(places) == 1).all()
            pieces.append((part.columns["tokens"][row][places].tolist(), part.columns["answer"][row][places].tolist()))
    singles = [
        (one.columns["tokens"][0][:n].tolist(), one.columns["answer"][0][:n].tolist())
        for one, n in zip(alone, sizes, strict=True)
    ]
    assert sorted(pieces) == sorted(singles)
    # Best fit decreasing needs at most 11/9 of the fewest rows, and one more.
    assert len(part.columns["length"]) <= 11 / 9 * -(-sum(sizes) // 64) + 1


def test_the_text_of_a_dialogue_is_that_of_apply_chat_template(tokenizer: Tokenizer, fast: Any) -> None:
    from dist_lm.data.kinds.chat import ChatTemplate, encode_chat, encode_prompt

    text = (
        "{% for m in messages %}[SEP]{{ m.role }}: {{ m.content | trim }}[CLS]\n{% endfor %}"
        "{% if add_generation_prompt %}[SEP]assistant: {% endif %}"
    )
    messages = [
        {"role": "user", "content": "What does [SEP] mean? "},
        {"role": "assistant", "content": "It parts two texts"},
        {"role": "user", "content": "And pass?"},
        {"role": "assistant", "content": "Nothing"},
    ]
    template = ChatTemplate(text, {})
    fast.chat_template = text
    assert template.render(messages) == fast.apply_chat_template(messages, tokenize=False)
    pieces = encode_chat(messages, template, tokenizer)
    assert [answer for _, answer in pieces] == [False, True, False, True]
    ids = [number for piece, _ in pieces for number in piece]
    # The template's own separators are special, the one in the user's text is not.
    assert ids.count(tokenizer.sep_id) == 4
    assert ids.count(tokenizer.cls_id) == 4
    answers = [tokenizer.decode(piece) for piece, answer in pieces if answer]
    assert "nothing" in answers[1]
    assert "pass" not in answers[1]
    assert encode_prompt(messages[:3], template, tokenizer) == [n for piece, _ in pieces[:3] for n in piece]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"text": "x"}, "neither `messages` nor `prompt`"),
        ({"prompt": "x"}, "no message of the role assistant"),
        ({"messages": [{"role": "user"}]}, "message 0 has no text"),
        ({"messages": "x"}, "is not a list"),
    ],
)
def test_dialogues_that_cannot_be_used_say_why(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        kind_named("instruction").clean(record, rules_of(16))


def test_a_chat_template_that_parts_no_messages_is_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    shutil.copytree(tokenizer.path, tmp_path / "tokenizer")
    # What it writes of the first message changes with the second.
    (tmp_path / "tokenizer" / "chat_template.jinja").write_text("{{ messages | length }}{{ messages[0].content }}")
    other = load_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(DataError, match="the chat template of the tokenizer does not fit the dialogues") as caught:
        packed("instruction", [{"prompt": "What is pass?", "response": "Nothing"}], other, rules_of(16))
    assert "begins with `What is pass?`" in caught.value.why


def test_a_tokenizer_of_several_chat_templates_is_refused(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    with pytest.raises(DataError, match="the tokenizer has several chat templates"):
        load_template(tmp_path)
