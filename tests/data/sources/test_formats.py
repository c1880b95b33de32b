"""Every format: what its files give, in whole, in parts, compressed, and damaged."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dist_lm.data.sources.files import SourceFile, reading
from dist_lm.data.sources.format import ReadSettings
from dist_lm.data.sources.inputs import format_of, list_inputs, read_records, read_split, read_texts
from dist_lm.data.sources.record import BadRecords, Record, TooManyBad
from dist_lm.errors import ConfigError, DataError, EnvironmentFault

pytestmark = pytest.mark.fast
TEXTS = ["one line", "caf\u00e9 \u4f60\u597d", "two\nlines", 'quotes " and, commas', "tab\tinside"]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(texts: list[str]) -> str:
    return "".join(json.dumps({"text": text}, ensure_ascii=number % 2 == 0) + "\n" for number, text in enumerate(texts))


def read(*paths: Path, max_bad: int = 0, **settings: Any) -> list[Record]:
    return list(read_records([str(path) for path in paths], ReadSettings(**settings), BadRecords(max_bad)))


def texts(*paths: Path, **settings: Any) -> list[Any]:
    return [record.fields["text"] for record in read(*paths, **settings)]


def csv_text() -> str:
    quoted = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
    return "text,other\r\n" + "".join(f"{text},x\r\n" for text in quoted)


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def everywhere(tmp_path: Path) -> dict[str, Path]:
    """The same texts in every format that can hold them."""
    table = pa.table({"other": list(range(len(TEXTS))), "text": TEXTS})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "hf")
    tar = tar_of({f"dir.x/s{number}.txt": text.encode() for number, text in enumerate(TEXTS)})
    return {
        "jsonl": write(tmp_path / "a.jsonl", json_lines(TEXTS)),
        "csv": write(tmp_path / "a.csv", csv_text()),
        "parquet": tmp_path / "a.parquet",
        "hf": tmp_path / "hf",
        "json": write(tmp_path / "a.json", json.dumps([{"text": text} for text in TEXTS])),
        "tar": write(tmp_path / "a.tar", tar),
    }


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "hf", "json", "tar"])
def test_every_format_gives_the_same_texts(everywhere: dict[str, Path], kind: str) -> None:
    assert texts(everywhere[kind]) == TEXTS


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "json", "tar"])
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_every_format_is_read_compressed(everywhere: dict[str, Path], kind: str, suffix: str) -> None:
    content = everywhere[kind].read_bytes()
    compressed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path = write(everywhere[kind].with_name(everywhere[kind].name + suffix), compressed)
    assert texts(path) == TEXTS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_that_is_cut_short_is_named(tmp_path: Path, suffix: str) -> None:
    content = json_lines(TEXTS * 50).encode()
    compressed = gzip.compress(content) if suffix == ".gz" else zstandard.compress(content)
    path = write(tmp_path / f"a.jsonl{suffix}", compressed[:-5])
    with pytest.raises(DataError, match="damaged") as error:
        texts(path)
    assert error.value.where == str(path)


@pytest.mark.parametrize("target", [1, 7, 40, 1000])
def test_the_parts_of_a_file_of_lines_give_each_line_once(tmp_path: Path, target: int) -> None:
    path = write(tmp_path / "a.jsonl", json_lines(TEXTS * 3))
    file = SourceFile(str(path), path.stat().st_size)
    settings = ReadSettings()
    splits = format_of(file, settings).splits(file, target, settings)
    assert len(splits) == -(-file.num_bytes // target)
    found = [record for split in splits for record in read_split(split, settings, BadRecords())]
    assert [record.fields["text"] for record in found] == TEXTS * 3
    assert [str(record.where) for record in found] == [f"{path}:{line}" for line in range(1, len(TEXTS) * 3 + 1)]


def test_a_table_reads_the_columns_that_are_looked_at(everywhere: dict[str, Path]) -> None:
    path = everywhere["parquet"]
    assert set(read(path, wanted=("text",), optional=("id",))[0].fields) == {"text"}
    assert set(read(path, wanted=("text",), optional=("other",))[0].fields) == {"text", "other"}
    assert set(read(path, wanted=("title",))[0].fields) == {"text", "other"}


def test_the_parts_of_a_parquet_file_are_its_row_groups(everywhere: dict[str, Path]) -> None:
    path = everywhere["parquet"]
    file = SourceFile(str(path), path.stat().st_size)
    splits = format_of(file, ReadSettings()).splits(file, 1, ReadSettings())
    assert len(splits) == 3
    found = [record for split in splits for record in read_split(split, ReadSettings(wanted=("text",)), BadRecords())]
    assert [(record.fields, str(record.where)) for record in found] == [
        ({"text": text}, f"{path}:row {row}") for row, text in enumerate(TEXTS, 1)
    ]


@pytest.mark.parametrize(
    ("documents", "expected"),
    [
        ("file", ["a b\nc\n\n\nd\n"]),
        ("paragraph", ["a b\nc\n", "d\n"]),
        ("line", ["a b", "c", "d"]),
    ],
)
def test_what_a_document_of_a_text_file_is(tmp_path: Path, documents: str, expected: list[str]) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfa b\nc\n\n\nd\n")
    assert texts(path, text_documents=documents) == expected


def test_a_tsv_has_no_quotes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", 'text\tlabel\n"Go," he said\tx\n')
    assert read(path)[0].fields == {"text": '"Go," he said', "label": "x"}


CONLL = "-DOCSTART- -X- O O\n\nJohn NNP B-PER\nlives VBZ O\n\nin IN O\nR\u00edo NNP B-LOC\n"


def test_conll_sentences_and_the_choice_of_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.conll", CONLL)
    found = read(path)
    assert [record.fields for record in found] == [
        {"tokens": ["John", "lives"], "tags": ["B-PER", "O"]},
        {"tokens": ["in", "R\u00edo"], "tags": ["O", "B-LOC"]},
    ]
    assert str(found[1].where) == f"{path}:6"
    assert read(path, tags_column=1)[0].fields["tags"] == ["NNP", "VBZ"]
    tabs = write(tmp_path / "b.iob2", "New York\tB-LOC\n")
    assert read(tabs)[0].fields["tokens"] == ["New York"]


def test_squad_gives_a_record_a_question(tmp_path: Path) -> None:
    answers = [{"text": "Paris", "answer_start": 3}]
    questions = [{"id": 7, "question": "Where?", "answers": answers}, {"id": "8", "question": "Why?", "answers": []}]
    content = {"version": "2", "data": [{"paragraphs": [{"context": "In Paris.", "qas": questions}]}]}
    first, second = read(write(tmp_path / "a.json", json.dumps(content)))
    assert first.fields == {
        "id": "7",
        "question": "Where?",
        "context": "In Paris.",
        "answers": {"text": ["Paris"], "answer_start": [3]},
    }
    assert second.fields["answers"] == {"text": [], "answer_start": []}
    assert str(second.where).endswith("question 8")


def test_the_classes_of_a_hugging_face_data_set_have_their_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.Sequence(datasets.ClassLabel(names=["O", "B-LOC"])),
        }
    )
    rows = {"label": [1, 0, -1], "tags": [[0, 1], [], [1]]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(tmp_path / "hf")
    saved.to_parquet(tmp_path / "hf.parquet")
    for path in (tmp_path / "hf", tmp_path / "hf.parquet"):
        assert [record.fields["label"] for record in read(path)] == ["pos", "neg", None]
        assert [record.fields["tags"] for record in read(path)] == [["O", "B-LOC"], [], ["B-LOC"]]


def test_a_hugging_face_data_set_of_several_files_is_read_in_their_order(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": [str(number) for number in range(10)]}).save_to_disk(
        tmp_path / "hf", num_shards=4
    )
    assert texts(tmp_path / "hf") == [str(number) for number in range(10)]


def test_a_folder_of_several_hugging_face_data_sets_wants_a_choice(tmp_path: Path) -> None:
    one = datasets.Dataset.from_dict({"text": ["x"]})
    datasets.DatasetDict({"train": one, "test": one}).save_to_disk(tmp_path / "hf")
    with pytest.raises(DataError, match="several data sets") as error:
        texts(tmp_path / "hf")
    assert "test, train" in error.value.why
    assert texts(tmp_path / "hf" / "train") == ["x"]


@pytest.mark.parametrize("damage", ["no JSON", "another JSON", "a file is missing"])
def test_a_hugging_face_data_set_that_is_not_whole_is_named(tmp_path: Path, damage: str) -> None:
    datasets.Dataset.from_dict({"text": ["x", "y"]}).save_to_disk(tmp_path, num_shards=2)
    if damage == "a file is missing":
        (tmp_path / "data-00001-of-00002.arrow").unlink()
    else:
        (tmp_path / "state.json").write_text("{" if damage == "no JSON" else "[]")
    with pytest.raises(DataError, match="a Hugging Face data set cannot be read"):
        texts(tmp_path)


def test_the_members_of_a_webdataset_sample_are_one_record(tmp_path: Path) -> None:
    members = {"1.json": b'{"label": 3}', "1.txt": b"first", "1.jpg": b"\xff", "2.json": b'{"text": "second"}'}
    found = read(write(tmp_path / "a.tar", tar_of(members)))
    assert [record.fields for record in found] == [{"label": 3, "text": "first"}, {"text": "second"}]


@pytest.mark.parametrize("kept", [700, 2000, 2560, 3000])
def test_a_tar_that_is_cut_short_is_damaged(tmp_path: Path, kept: int) -> None:
    content = tar_of({f"{number}.txt": b"x" * 600 for number in range(3)})
    path = write(tmp_path / "a.tar", content[:kept])
    with pytest.raises(DataError, match="damaged") as error:
        texts(path)
    assert str(path) in error.value.where


def test_a_tar_with_a_broken_header_is_damaged_and_not_short(tmp_path: Path) -> None:
    content = bytearray(tar_of({f"{number}.txt": b"x" * 600 for number in range(3)}))
    content[1536 + 150] ^= 1
    with pytest.raises(DataError, match="damaged") as error:
        texts(write(tmp_path / "a.tar", bytes(content)))
    assert "no end mark at byte 1536" in error.value.why


def test_a_tar_member_is_never_a_path(tmp_path: Path) -> None:
    content = tar_of({"../../evil.txt": b"text"})
    assert texts(write(tmp_path / "a.tar", content)) == ["text"]
    assert not (tmp_path.parent.parent / "evil.txt").exists()


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_parquet_file_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path, write_page_checksum=True, compression="none")
    content = bytearray(path.read_bytes())
    if damage == "cut":
        del content[-10:]
    else:
        content[content.index(b"one line")] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged") as error:
        texts(path)
    assert error.value.where == str(path)


BAD_FILES = [
    ("a.jsonl", b'{"text": "x"}\n{"text": \n', 2, "not JSON"),
    ("a.jsonl", b'{"text": "x"}\n[1]\n', 2, "a JSON object was expected, not list"),
    ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', 2, "not UTF-8: byte 0xff"),
    ("a.jsonl", b"[" * 100_000, 1, "nested too deeply"),
    ("a.txt", b"good\nbad \xe9\n", 2, "not UTF-8: byte 0xe9"),
    ("a.csv", b"text,label\nx,y\nx\n", 3, "1 fields, and the header has 2"),
    ("a.csv", b'text,label\nx,y\n"x,y\n', 3, "not CSV"),
    ("a.csv", b"text,label\nx,\xff\n", 2, "not UTF-8: byte 0xff"),
    ("a.conll", b"a O\nb\n", 2, "no token and tag in 1 column"),
    ("a.conll", b"a O\n\xff O\n", 2, "not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "line", "why"), BAD_FILES)
def test_a_bad_record_is_told_with_file_and_line(
    tmp_path: Path, name: str, content: bytes, line: int, why: str
) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(TooManyBad, match="1 bad record, and 0 are allowed") as error:
        read(path)
    assert error.value.where == f"{path}:{line}"
    assert why in error.value.why
    bad = BadRecords(1)
    list(read_records([str(path)], ReadSettings(), bad))
    assert bad.count == 1


def test_the_first_bad_records_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "\n".join(["x", '{"text": "good"}'] * 5))
    with pytest.raises(TooManyBad, match="5 bad records, and 4 are allowed") as error:
        read(path, max_bad=4)
    assert [line.partition(": ")[0] for line in error.value.why.splitlines()] == [f"{path}:{n}" for n in (1, 3, 5)]


def test_fields_get_our_names_and_a_dot_goes_into_nested_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"translation": {"en": "yes", "de": "ja"}, "a.b": "dotted"}\n')
    fields = {"source": "translation.en", "target": "translation.de", "text": "a.b"}
    record = read(path, fields=fields)[0]
    assert {name: record.fields[name] for name in fields} == {"source": "yes", "target": "ja", "text": "dotted"}
    with pytest.raises(TooManyBad) as error:
        read(path, fields={"text": "translation.fr"})
    assert "no field 'translation.fr' (there are: a.b, translation)" in error.value.why


def test_texts_for_a_tokenizer_leave_out_the_empty_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n{"text": ""}\n{"text": 1}\n')
    assert list(read_texts([str(path)], ReadSettings(), max_bad=1)) == ["x"]
    with pytest.raises(TooManyBad, match="1 bad record"):
        list(read_texts([str(path)], ReadSettings()))


def test_folders_patterns_and_files_are_listed_once_and_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "sub/a.txt", ".hidden/c.txt", "notes.md", "sub/.d.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    inputs = [str(tmp_path), str(tmp_path / "*.jsonl"), str(tmp_path / "sub" / "a.txt")]
    files = list_inputs(inputs, ReadSettings())
    assert [Path(file.location).relative_to(tmp_path) for file in files] == [Path("b.jsonl"), Path("sub/a.txt")]
    named = list_inputs([str(tmp_path)], ReadSettings(format="text"))
    assert [Path(file.location).name for file in named] == ["b.jsonl", "notes.md", "a.txt"]


def test_inputs_that_are_not_there_or_not_known_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        list_inputs([str(tmp_path / "nothing.txt")], ReadSettings())
    with pytest.raises(DataError, match="does not exist"):
        list_inputs([str(tmp_path / "*.txt")], ReadSettings())
    (tmp_path / "folder.jsonl").mkdir()
    for folder in (tmp_path, tmp_path / "folder.jsonl"):
        with pytest.raises(DataError, match="no readable files"):
            list_inputs([str(folder)], ReadSettings())
    with pytest.raises(DataError, match=r"files of kind '\.md'"):
        list_inputs([str(write(tmp_path / "notes.md", "x"))], ReadSettings())
    with pytest.raises(ConfigError, match="format `word`"):
        list_inputs([str(tmp_path / "notes.md")], ReadSettings(format="word"))
    with pytest.raises(DataError, match="no input"):
        list_inputs([], ReadSettings())


def test_an_input_that_the_machine_cannot_read_is_not_blamed_on_the_data(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.symlink_to(path)
    with pytest.raises(EnvironmentFault, match="cannot read an input") as caught, reading(str(path)):
        pass
    assert "symbolic links" in caught.value.why


@pytest.mark.parametrize(
    "content",
    [
        '{"rows": 1}',
        '{"data": 1}',
        "3",
        "{",
        "",
        '[{"text": "x"}',
        '[{"text": "x"}] 1',
        b'[{"text": "\xff"}]',
        "[" * 10**5,
    ],
)
def test_json_that_is_neither_a_list_nor_squad_is_refused(content: str | bytes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"(?s)a JSON file cannot be used.*a\.json"):
        read(write(tmp_path / "a.json", content))


def test_json_may_begin_with_a_mark_and_blanks(tmp_path: Path) -> None:
    (record,) = read(write(tmp_path / "a.json", b'\xef\xbb\xbf \n [{"text": "x", "score": 0.5}]'))
    assert record.fields == {"text": "x", "score": 0.5}


@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | st.text(max_size=9),
            lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3),
            max_leaves=8,
        ),
        max_size=4,
    )
)
def test_the_objects_of_a_json_list_are_those_of_the_json_module(
    tmp_path_factory: pytest.TempPathFactory, items: list[Any]
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "any.json", json.dumps(items))
    bad = BadRecords(len(items))
    found = [record.fields for record in read_records([str(path)], ReadSettings(), bad)]
    assert found == [item for item in items if isinstance(item, dict)]
    assert bad.count == len(items) - len(found)


@pytest.mark.parametrize(
    ("head", "item", "tail"),
    [
        ("[", '{"text": "' + "x" * 1000 + '"}', "]"),
        ('{"data": [', '{"paragraphs": [{"context": "' + "x" * 1000 + '", "qas": []}]}', "]}"),
    ],
    ids=["list", "squad"],
)
def test_memory_does_not_grow_with_a_json_file(head: str, item: str, tail: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", head + ",".join([item] * 20_000) + tail)
    records = read_records([str(path)], ReadSettings(), BadRecords())
    tracemalloc.start()
    try:
        assert sum(1 for _ in records) == (20_000 if head == "[" else 0)
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 10
    finally:
        tracemalloc.stop()
