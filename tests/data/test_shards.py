"""Shards on disk: what is written comes back, and whatever happens to a file is noticed and named."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from text_datasets import TextDataset, flip_bit, pair_columns, pair_rows, write_pairs

from dist_lm.data.blocks import owner_name
from dist_lm.data.shards import Column, Manifest, ShardReader, write_shard
from dist_lm.data.verify import verify_dataset
from dist_lm.errors import DataError, EnvironmentFault

SHARDS = [70, 64, 70]
BLOCK_ROWS = 16
READS = [True, False]
"""With the hash of the whole file, as `data verify` reads, and without, as training does."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TextDataset:
    return write_pairs(tmp_path_factory.mktemp("whole"), SHARDS, block_rows=BLOCK_ROWS)


@pytest.fixture
def victim(dataset: TextDataset, tmp_path: Path) -> TextDataset:
    """A copy that a test may damage."""
    folder = tmp_path / "victim"
    shutil.copytree(dataset.folder, folder)
    return TextDataset(folder, dataset.manifest, dataset.columns)


def read_all(dataset: TextDataset, *, verify: bool) -> dict[str, np.ndarray]:
    reader = ShardReader(dataset.folder, dataset.manifest, verify=verify)
    blocks = [
        block for shard, entry in enumerate(dataset.manifest.shards) for block in reader.blocks(shard, 0, entry.blocks)
    ]
    return {name: np.concatenate([block[name] for block in blocks]) for name in dataset.columns}


def error_of(dataset: TextDataset, *, verify: bool) -> str:
    with pytest.raises(DataError) as caught:
        read_all(dataset, verify=verify)
    return str(caught.value)


# ------------------------------------------------------------------------------ whole files


def test_the_rows_that_were_written_come_back(dataset: TextDataset) -> None:
    assert verify_dataset(dataset.folder) == dataset.manifest
    rows = read_all(dataset, verify=True)
    for name, expected in dataset.columns.items():
        assert np.array_equal(rows[name], expected)
        assert rows[name].dtype == expected.dtype
    text = bytes(rows["first"][0][: rows["first_length"][0]].astype(np.uint8)).decode()
    assert text.strip()


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_any_range_of_blocks_is_read_by_itself(dataset: TextDataset, data: st.DataObject) -> None:
    shard = data.draw(st.integers(0, 2))
    entry = dataset.manifest.shards[shard]
    lo = data.draw(st.integers(0, entry.blocks - 1))
    hi = data.draw(st.integers(lo + 1, entry.blocks))
    blocks = list(ShardReader(dataset.folder, dataset.manifest).blocks(shard, lo, hi))
    begin = sum(SHARDS[:shard])
    rows = dataset.columns["second"][begin : begin + entry.rows][lo * BLOCK_ROWS : hi * BLOCK_ROWS]
    assert len(blocks) == hi - lo
    assert np.array_equal(np.concatenate([block["second"] for block in blocks]), rows)


def test_the_same_rows_give_the_same_bytes(dataset: TextDataset, tmp_path: Path) -> None:
    write_pairs(tmp_path, SHARDS, block_rows=BLOCK_ROWS)
    names = sorted(path.name for path in dataset.folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (dataset.folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_a_shard_is_a_plain_tar_that_others_can_read(dataset: TextDataset) -> None:
    with tarfile.open(dataset.tar(1)) as tar:
        members = tar.getmembers()
    offsets = [member.offset for member in members if member.name.endswith(".document")]
    end = members[-1].offset_data + -(-members[-1].size // 512) * 512
    assert dataset.offsets(1) == [*offsets, end]
    assert {member.mtime for member in members} == {0}
    # One header of 512 bytes a member: nothing was written in an extended format.
    assert all(member.offset_data - member.offset == 512 for member in members)
    samples = list(webdataset.WebDataset(str(dataset.tar(1)), shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [f"000001{block:06d}" for block in range(4)]
    first = np.frombuffer(samples[2]["first"], "<u2").reshape(-1, 16)
    assert np.array_equal(first, dataset.columns["first"][70 + 32 : 70 + 48])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int32", "int64", "float32"])
def test_every_type_survives_with_its_extreme_values(dtype: str, tmp_path: Path) -> None:
    limits = np.finfo(dtype) if dtype == "float32" else np.iinfo(dtype)
    array = np.array([[limits.min, limits.max, 1]] * 5, dtype=dtype).reshape(5, 3, 1)
    spec = [Column("values", dtype, (3, 1))]  # type: ignore[arg-type]
    entry = write_shard(tmp_path, 7, {"values": array}, spec=spec, block_rows=2)
    assert (entry.name, entry.rows, entry.blocks) == ("s-000007.tar", 5, 3)
    with tarfile.open(tmp_path / entry.name) as tar:
        parts = [tar.extractfile(member).read() for member in tar.getmembers()]  # type: ignore[union-attr]
    little_endian = np.frombuffer(b"".join(parts), spec[0].numpy_dtype)
    assert np.array_equal(little_endian.reshape(5, 3, 1), array)


# ---------------------------------------------------------------------------------- writing


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda rows: rows | {"document": rows["document"].astype(np.int64)},
            "document: dtype int64, not uint32",
        ),
        (lambda rows: rows | {"second": rows["second"][:, :-1]}, r"second: shape \(20, 15\), not \(20, 16\)"),
        (lambda rows: rows | {"document": rows["document"][:-1]}, r"document: shape \(19,\), not \(20,\)"),
        (lambda rows: {name: rows[name] for name in ("first", "second")}, "got columns"),
        (lambda rows: {name: array[:0] for name, array in rows.items()}, "there are no rows"),
    ],
)
def test_arrays_that_do_not_fit_the_columns_are_not_written(
    tmp_path: Path, change: Callable[[dict], dict], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_shard(tmp_path, 0, change(pair_rows(20, 35)), spec=pair_columns(35), block_rows=8)
    assert not list(tmp_path.iterdir())


def test_a_number_that_its_name_has_no_room_for_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shard 1000000 with 3 blocks cannot be numbered with six digits"):
        write_shard(tmp_path, 10**6, pair_rows(20, 35), spec=pair_columns(35), block_rows=8)
    assert not list(tmp_path.iterdir())


def test_a_writer_that_fails_leaves_the_shard_that_was_there(dataset: TextDataset, tmp_path: Path) -> None:
    """A limit on file sizes stands for the full disk."""
    before = dataset.tar(0).read_bytes()
    (tmp_path / "s-000000.tar").write_bytes(before)
    script = (
        "import resource, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from text_datasets import pair_columns, pair_rows; from dist_lm.data.shards import write_shard;"
        "from dist_lm.errors import EnvironmentFault;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, (20000, {resource.RLIM_INFINITY}));\n"
        "try: write_shard(Path(sys.argv[2]), 0, pair_rows(900, 35), spec=pair_columns(35), block_rows=8)\n"
        "except EnvironmentFault as error: print(error)"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path)]
    message = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "s-000000.tar" in message
    assert "File too large" in message
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"s-000000.tar": before}


def test_what_a_killed_writer_left_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "s-000000.tar.tmp").write_bytes(b"half of a shard" * 10_000)
    rows = pair_rows(20, 35)
    entry = write_shard(tmp_path, 0, rows, spec=pair_columns(35), block_rows=8)
    assert (tmp_path / "s-000000.tar").stat().st_size == entry.bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-000000.tar", "s-000000.tar.idx"]


def ragged(lengths: list[int], capacity: int) -> tuple[list[Column], dict[str, np.ndarray]]:
    spec = [Column("tokens", "uint16", (capacity,), lengths="length"), Column("length", "uint16")]
    tokens = np.arange(1, 1 + len(lengths) * capacity, dtype=np.uint16).reshape(len(lengths), capacity)
    return spec, {"tokens": tokens, "length": np.array(lengths, dtype=np.uint16)}


@given(st.lists(st.integers(0, 9), min_size=1, max_size=20), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_padding_is_not_stored_and_comes_back_as_zeros(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], block_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("ragged", numbered=True)
    spec, columns = ragged(lengths, 9)
    entry = write_shard(folder, 0, columns, spec=spec, block_rows=block_rows)
    with tarfile.open(folder / entry.name) as tar:
        stored = sum(member.size for member in tar.getmembers() if member.name.endswith(".tokens"))
    assert stored == 2 * sum(lengths)
    manifest = Manifest("pairs", tuple(spec), block_rows, 9, 99, "0" * 64, len(lengths), sum(lengths), (entry,))
    blocks = list(ShardReader(folder, manifest).blocks(0, 0, entry.blocks))
    expected = np.where(np.arange(9) < columns["length"][:, None], columns["tokens"], 0)
    assert np.array_equal(np.concatenate([block["tokens"] for block in blocks]), expected)
    # What stands in the padding decides nothing.
    again = write_shard(folder, 0, columns | {"tokens": expected}, spec=spec, block_rows=block_rows)
    assert again == entry


def test_a_length_beyond_the_capacity_is_not_written_and_not_read(tmp_path: Path) -> None:
    spec, columns = ragged([3, 5, 4], 5)
    wrong = columns | {"length": np.array([3, 6, 4], dtype=np.uint16)}
    with pytest.raises(DataError, match=r"length: a length is outside \[0, 5\]"):
        write_shard(tmp_path, 0, wrong, spec=spec, block_rows=4)
    entry = write_shard(tmp_path, 0, columns, spec=spec, block_rows=4)
    narrow = (replace(spec[0], shape=(4,)), spec[1])
    manifest = Manifest("pairs", narrow, 4, 9, 99, "0" * 64, 3, 12, (entry,))
    with pytest.raises(DataError, match=r"(?s)s-000000\.tar, block 0\).*outside \[0, 4\]"):
        list(ShardReader(tmp_path, manifest).blocks(0, 0, 1))


def test_shards_of_512_tokens_a_row_take_at_most_3_percent_more_than_their_tokens(tmp_path: Path) -> None:
    spec, columns = ragged([512] * 512, 512)
    rows = write_shard(tmp_path, 0, columns, spec=spec, block_rows=256)
    stream = {"tokens": columns["tokens"].reshape(-1)}
    tokens = write_shard(tmp_path, 1, stream, spec=[Column("tokens", "uint16")], block_rows=65536)
    for entry in (rows, tokens):
        on_disk = entry.bytes + (tmp_path / entry.index_name).stat().st_size
        # Behind its last member a tar is filled up to a multiple of 10 kB, once a shard.
        assert on_disk - tarfile.RECORDSIZE <= 1.03 * 512 * 512 * 2


# ---------------------------------------------------------------------------------- damages


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_one_flipped_bit_anywhere_is_found_and_its_block_named(
    dataset: TextDataset, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("flipped", numbered=True)
    shutil.copytree(dataset.folder, folder, dirs_exist_ok=True)
    victim = TextDataset(folder, dataset.manifest, dataset.columns)
    shard = data.draw(st.integers(0, 2))
    offset = data.draw(st.integers(0, dataset.manifest.shards[shard].bytes - 1))
    flip_bit(victim.tar(shard), offset, data.draw(st.integers(0, 7)))
    with pytest.raises(DataError) as caught:
        verify_dataset(folder)
    message = str(caught.value)
    assert dataset.manifest.shards[shard].name in message
    assert "SHA-256" in message
    with tarfile.open(dataset.tar(shard)) as tar:
        meaningful = any(m.offset <= offset < m.offset_data + m.size for m in tar.getmembers())
    if meaningful:
        block = int(np.searchsorted(dataset.offsets(shard), offset, side="right")) - 1
        # Redundant bytes of a header's checksum field may change without harm to the block.
        assert f"block {block})" in message or "Every block is whole" in message


@pytest.mark.parametrize("verify", READS)
@pytest.mark.parametrize("member", [0, 1, 7, 10, -1])
@pytest.mark.parametrize("field", [pytest.param(0, id="name"), pytest.param(134, id="size")])
def test_a_damaged_tar_header_is_an_error_that_names_shard_and_block(
    victim: TextDataset, member: int, field: int, verify: bool
) -> None:
    with tarfile.open(victim.tar(1)) as tar:
        members = tar.getmembers()
    flip_bit(victim.tar(1), members[member].offset + field)
    message = error_of(victim, verify=verify)
    block = member % len(members) // len(victim.manifest.columns)
    assert f"s-000001.tar, block {block})" in message
    assert verify or "The tar header at byte" in message


def test_blocks_of_another_size_than_the_columns_say_are_refused(victim: TextDataset) -> None:
    narrow = replace(victim.manifest.columns[0], dtype="uint8")
    manifest = replace(victim.manifest, columns=(narrow, *victim.manifest.columns[1:]))
    reader = ShardReader(victim.folder, manifest, verify=False)
    with pytest.raises(DataError, match=r"first: 502 bytes, expected 251 \(16 rows\)"):
        next(reader.blocks(0, 2, 3))


def test_a_column_that_the_manifest_does_not_know_is_refused(victim: TextDataset) -> None:
    manifest = replace(victim.manifest, columns=victim.manifest.columns[:-1])
    with pytest.raises(DataError, match=r"Found the columns .*'document'"):
        next(ShardReader(victim.folder, manifest, verify=False).blocks(0, 0, 1))


def test_damaged_content_is_an_error_that_names_shard_and_block_and_column(victim: TextDataset) -> None:
    with tarfile.open(victim.tar(2)) as tar:
        member = next(m for m in tar.getmembers() if m.name == "000002000003.second")
    flip_bit(victim.tar(2), member.offset_data + 100)
    message = error_of(victim, verify=True)
    assert "s-000002.tar, block 3)" in message
    assert "The content of 000002000003.second is damaged." in message


@pytest.mark.parametrize("verify", READS)
@pytest.mark.parametrize("block", [0, 2, 4])
@pytest.mark.parametrize("inside", [-1, 0, 1, 511, 512, 700, 2000])
def test_a_shard_cut_short_anywhere_is_an_error_that_names_the_block(
    victim: TextDataset, block: int, inside: int, verify: bool
) -> None:
    size = max(victim.offsets(0)[block] + inside, 0)
    with victim.tar(0).open("rb+") as file:
        file.truncate(size)
    message = error_of(victim, verify=verify)
    expected = max(block - 1, 0) if inside < 0 else block
    assert f"s-000000.tar, block {expected})" in message
    assert f"{size} bytes" in message


@pytest.mark.parametrize("verify", READS)
def test_a_shard_with_bytes_behind_it_is_refused(victim: TextDataset, verify: bool) -> None:
    with victim.tar(0).open("ab") as file:
        file.write(b"\0" * 512)
    assert "s-000000.tar" in error_of(victim, verify=verify)


@pytest.mark.parametrize("verify", READS)
@pytest.mark.parametrize("name", ["s-000001.tar", "s-000001.tar.idx"])
def test_a_missing_file_is_named(victim: TextDataset, name: str, verify: bool) -> None:
    (victim.folder / name).unlink()
    message = error_of(victim, verify=verify)
    assert f"{name}" in message.splitlines()[0]
    assert "The file is missing" in message


@pytest.mark.parametrize("verify", READS)
def test_exchanged_shards_are_found_out(victim: TextDataset, verify: bool) -> None:
    """Shards 0 and 2 have the same size, and each comes with its own index."""
    assert victim.manifest.shards[0].bytes == victim.manifest.shards[2].bytes
    for path in (victim.tar, victim.index):
        one, two = path(0), path(2)
        content = one.read_bytes()
        one.write_bytes(two.read_bytes())
        two.write_bytes(content)
    message = error_of(victim, verify=verify)
    assert "s-000000.tar, block 0)" in message
    assert "000002000000" in message


@pytest.mark.parametrize("verify", READS)
@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda index: index[:-8], id="too-short"),
        pytest.param(lambda index: index + index[-8:], id="too-long"),
        pytest.param(lambda index: b"", id="empty"),
        pytest.param(lambda index: index[8:16] + index[8:], id="another-first-offset"),
        pytest.param(lambda index: index[:8] + bytes([index[8] ^ 1]) + index[9:], id="flipped-bit"),
    ],
)
def test_a_wrong_index_is_an_error_that_names_it(
    victim: TextDataset, damage: Callable[[bytes], bytes], verify: bool
) -> None:
    victim.index(1).write_bytes(damage(victim.index(1).read_bytes()))
    assert "s-000001.tar.idx" in error_of(victim, verify=verify)


def test_the_index_of_another_shard_is_an_error(victim: TextDataset) -> None:
    shutil.copyfile(victim.index(1), victim.index(0))
    assert "s-000000.tar.idx" in error_of(victim, verify=False)


def test_a_folder_in_the_place_of_a_shard_is_named(victim: TextDataset) -> None:
    victim.tar(1).unlink()
    victim.tar(1).mkdir()
    assert "s-000001.tar" in error_of(victim, verify=False)


def test_a_read_error_of_the_machine_is_not_blamed_on_the_data(dataset: TextDataset) -> None:
    """/proc/self/mem can be opened, but its first bytes cannot be read: an I/O error of the real kind."""

    def opener(location: str, *, size: int | None) -> object:
        return open("/proc/self/mem" if location.endswith(".idx") else location, "rb")

    reader = ShardReader(dataset.folder, dataset.manifest, opener=opener)  # type: ignore[arg-type]
    with pytest.raises(EnvironmentFault, match="cannot read a shard"):
        next(reader.blocks(0, 0, 1))


@pytest.mark.parametrize("verify", READS)
def test_content_that_changes_under_a_running_reader_is_an_error(victim: TextDataset, verify: bool) -> None:
    reader = ShardReader(victim.folder, victim.manifest, verify=verify)
    assert len(list(reader.blocks(0, 0, 5))) == 5
    with tarfile.open(victim.tar(0)) as tar:
        member = next(m for m in tar.getmembers() if m.name == "000000000003.second")
    flip_bit(victim.tar(0), member.offset_data)
    with pytest.raises(DataError, match=r"(?s)s-000000\.tar, block 3\).*content of 000000000003\.second is damaged"):
        list(reader.blocks(0, 0, 5))


def test_a_shard_of_another_preparation_is_refused_by_its_first_block(victim: TextDataset, tmp_path: Path) -> None:
    """Same number, same sizes, same index, sound checksums: only the content is that of other rows."""
    columns = {name: array[:70][::-1].copy() for name, array in victim.columns.items()}
    whole = {name: array[:70] for name, array in victim.columns.items()}
    same_sizes = columns | {name: whole[name] for name in ("first_length", "second_length")}
    entry = write_shard(tmp_path, 0, same_sizes, spec=victim.manifest.columns, block_rows=BLOCK_ROWS)
    assert entry.index_sha256 == victim.manifest.shards[0].index_sha256
    shutil.copyfile(tmp_path / entry.name, victim.tar(0))
    message = error_of(victim, verify=False)
    assert "s-000000.tar, block 0)" in message
    assert f"is of another preparation: {entry.content}" in message


@pytest.mark.parametrize("cut", [0, 300, 700])
def test_a_shard_that_shrinks_under_a_running_reader_is_an_error(victim: TextDataset, cut: int) -> None:
    reader = ShardReader(victim.folder, victim.manifest)
    assert len(list(reader.blocks(0, 0, 5))) == 5
    with victim.tar(0).open("rb+") as file:
        file.truncate(victim.offsets(0)[2] + cut)
    with pytest.raises(DataError, match=r"s-000000\.tar, block 2\)"):
        list(reader.blocks(0, 0, 5))


@pytest.mark.parametrize("piece_bytes", [1, 20_000, 1 << 20])
def test_memory_that_is_read_into_again_holds_a_block_until_the_next_is_asked_for(
    dataset: TextDataset, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dist_lm.data.window._LOCAL_PIECE_BYTES", piece_bytes)
    reader = ShardReader(dataset.folder, dataset.manifest, reuse_memory=True)
    blocks = [{name: array.copy() for name, array in block.items()} for block in reader.blocks(0, 0, 5)]
    for name, array in dataset.columns.items():
        assert np.array_equal(np.concatenate([block[name] for block in blocks]), array[:70])


@given(st.binary(max_size=4096))
def test_the_checksum_is_the_crc32_of_zlib(payload: bytes) -> None:
    assert owner_name(payload) == f"crc32:{zlib.crc32(payload):08x}"
