"""What every kind promises, and what each makes of real text."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest

from dist_lm.data.kinds.base import Empty, PackedRows, PackingRules, Unusable
from dist_lm.data.kinds.classification import cut_longer_first
from dist_lm.data.kinds.registry import KINDS, kind_named
from dist_lm.data.tokenizer import Tokenizer, train_tokenizer
from dist_lm.errors import ConfigError

pytestmark = pytest.mark.fast
TEXTS = [topics[name] for name in sorted(topics)[:12]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=600, out=tmp_path_factory.mktemp("kinds") / "tokenizer")


def rules(**settings: Any) -> PackingRules:
    return PackingRules(**{"seq_len": 32, "min_tokens": 1, "token_dtype": "uint16", **settings})


def pack(kind: str, records: list[dict[str, Any]], tokenizer: Tokenizer, **settings: Any) -> PackedRows:
    wanted = rules(**settings)
    kind_named(kind).check_rules(wanted)
    cleaned = [kind_named(kind).clean(record, wanted) for record in records]
    packed = kind_named(kind).pack(cleaned, tokenizer, wanted)
    for column in kind_named(kind).columns(wanted):
        array = packed.columns[column.name]
        assert array.dtype == column.numpy_dtype, column
        assert array.shape == (len(packed.document), *column.shape), column
    assert set(packed.columns) == {column.name for column in kind_named(kind).columns(wanted)}
    return packed


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_kind_is_registered_under_its_name_and_its_columns_refer_to_each_other(kind: Any) -> None:
    assert KINDS[kind.name] is kind
    columns = {column.name: column for column in kind.columns(rules())}
    assert set(columns) & set(kind.token_columns)
    for column in columns.values():
        assert not column.lengths or columns[column.lengths].shape == ()


def test_pairs_hold_all_tokens_of_a_document_in_order(tokenizer: Tokenizer) -> None:
    packed = pack("pairs", [{"text": text} for text in TEXTS], tokenizer)
    for document, text in enumerate(TEXTS):
        got: list[int] = []
        for row in np.flatnonzero(packed.document == document):
            for name in ("first", "second"):
                got += packed.columns[name][row, : packed.columns[f"{name}_length"][row]].tolist()
        assert tokenizer.decode(got) == tokenizer.decode(tokenizer.encode_batch([text])[0])


def test_rows_of_one_document_share_a_document_number_and_others_do_not(tokenizer: Tokenizer) -> None:
    packed = pack("pairs", [{"text": text} for text in TEXTS], tokenizer)
    names = packed.columns["document"]
    assert len({(int(a), int(b)) for a, b in zip(names, packed.document, strict=True)}) == len(TEXTS)
    assert len(set(names.tolist())) == len(TEXTS)


def test_tokens_are_the_documents_each_with_a_separator_behind(tokenizer: Tokenizer) -> None:
    packed = pack("tokens", [{"text": text} for text in TEXTS], tokenizer)
    expected = [[*ids, tokenizer.separator_id] for ids in tokenizer.encode_batch(TEXTS)]
    assert packed.columns["tokens"].tolist() == [token for ids in expected for token in ids]
    assert np.bincount(packed.document).tolist() == [len(ids) for ids in expected]
    assert kind_named("tokens").facts(tokenizer, rules()) == {"separator_id": tokenizer.separator_id}


def test_a_document_that_is_too_short_leaves_no_token_and_no_separator(tokenizer: Tokenizer) -> None:
    packed = pack("tokens", [{"text": "a"}, {"text": TEXTS[0]}], tokenizer, min_tokens=5)
    assert set(packed.document.tolist()) == {1}
    assert packed.lost[0].tolist() == [1, 1, 0, 0]


def test_one_class_a_text(tokenizer: Tokenizer) -> None:
    records = [{"text": "good", "label": "pos"}, {"text": "bad", "label": 0}, {"text": "fine", "label": "pos"}]
    packed = pack("classification", records, tokenizer)
    assert [packed.labels[number] for number in packed.columns["label"]] == ["pos", "0", "pos"]


def test_many_classes_a_text(tokenizer: Tokenizer) -> None:
    records = [{"text": "one", "label": ["b", "a", "b"]}, {"text": "two", "label": []}, {"text": "3", "label": ["c"]}]
    packed = pack("classification", records, tokenizer, options={"labels": "many"})
    numbers, lengths = packed.columns["labels"], packed.columns["num_labels"]
    named = [[packed.labels[n] for n in row[:length]] for row, length in zip(numbers, lengths, strict=True)]
    assert named == [["a", "b"], [], ["c"]]
    assert (numbers[1] == -1).all()


def test_a_number_a_text(tokenizer: Tokenizer) -> None:
    records = [{"text": "one", "label": "2.5"}, {"text": "two", "label": -1}]
    packed = pack("classification", records, tokenizer, options={"labels": "number"})
    assert packed.columns["target"].tolist() == [2.5, -1.0]
    assert not packed.labels


def test_of_a_pair_of_texts_the_longer_gives_way(tokenizer: Tokenizer) -> None:
    long, short = TEXTS[0], "a short one"
    options = {"text_pair": True}
    records = [{"text": long, "text_pair": short, "label": "x"}, {"text": long, "text_pair": long, "label": "x"}]
    packed = pack("classification", records, tokenizer, options=options)
    short_ids = tokenizer.encode_batch([short])[0]
    assert packed.columns["second_length"].tolist() == [len(short_ids), 14]
    assert packed.columns["first_length"].tolist() == [29 - len(short_ids), 15]
    assert packed.lost[:, 2].tolist() == [1, 1]


@pytest.mark.parametrize(("first", "second"), [(0, 0), (3, 50), (50, 3), (50, 50), (5, 4), (6, 4), (5, 6)])
def test_cutting_leaves_what_fits_and_never_more(first: int, second: int) -> None:
    a, b = cut_longer_first(list(range(first)), list(range(second)), 10)
    assert len(a) + len(b) == min(first + second, 10)
    assert a == list(range(len(a)))
    assert b == list(range(len(b)))
    assert len(a) == first or len(a) >= 5
    assert len(b) == second or len(b) >= 5


@pytest.mark.parametrize(
    ("kind", "fields", "options", "why"),
    [
        ("pairs", {"body": "x"}, {}, "no field 'text'"),
        ("pairs", {"text": 3}, {}, "is int, not text"),
        ("tokens", {"text": "\ud800"}, {}, "half of a surrogate pair"),
        ("classification", {"text": "x"}, {}, "no field 'label'"),
        ("classification", {"text": "x", "label": None}, {}, "no field 'label'"),
        ("classification", {"text": "x", "label": 0.5}, {}, "for regression"),
        ("classification", {"text": "x", "label": ["a"]}, {}, "must be a text or a whole number"),
        ("classification", {"text": "x", "label": "a"}, {"labels": "many"}, "must be a list of labels"),
        ("classification", {"text": "x", "label": [str(i) for i in range(33)]}, {"labels": "many"}, "33 labels"),
        ("classification", {"text": "x", "label": "a"}, {"labels": "number"}, "must be a finite number"),
        ("classification", {"text": "x", "label": float("nan")}, {"labels": "number"}, "must be a finite number"),
        ("classification", {"text": "x", "label": "a"}, {"text_pair": True}, "no field 'text_pair'"),
    ],
)
def test_a_record_that_does_not_fit_is_refused_with_the_field(
    kind: str, fields: dict[str, Any], options: dict[str, Any], why: str
) -> None:
    with pytest.raises(Unusable, match=why):
        kind_named(kind).clean(fields, rules(options=options))


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_a_record_without_text_is_empty(text: str) -> None:
    with pytest.raises(Empty):
        kind_named("pairs").clean({"text": text}, rules())


def test_an_unknown_kind_and_an_unknown_option_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kind `pears` is unknown"):
        kind_named("pears")
    with pytest.raises(ConfigError, match="has no option `labels`"):
        kind_named("pairs").check_rules(rules(options={"labels": "one"}))
    with pytest.raises(ConfigError, match="labels `two` are unknown"):
        kind_named("classification").check_rules(rules(options={"labels": "two"}))
