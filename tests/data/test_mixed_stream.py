"""Several data sets in one stream: shares by tokens, exactness, stages, resume, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_datasets import write_pairs, write_tokens

from dist_lm.config import SourceSpec
from dist_lm.data.mixture import BLOCK_ROWS
from dist_lm.data.rows import Rows
from dist_lm.data.stream import Stream
from dist_lm.data.training_set import TrainingSet, source_names
from dist_lm.errors import ConfigError, DataError

pytestmark = pytest.mark.fast

LANES, ERA, GLOBAL_ROWS = 4, 24, 48
RANKS = [1, 2, 3, 4, 6, 8]
SIZES = {"wiki": [120, 33, 1], "code": [64, 40], "books": [90]}
WEIGHTS = {"wiki": 0.5, "code": 0.3, "books": 0.2}
STAGES = [(1000, {"wiki": 0.1, "books": 0.6})]
STEPS = 120
"""Long enough for several epochs of each source, and a change of the weights inside a block."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same text in data sets of different sizes and blocks."""
    folder = tmp_path_factory.mktemp("mixture")
    for block_rows, (name, shards) in enumerate(SIZES.items(), 8):
        write_pairs(folder / name / "train", shards, block_rows=block_rows)
    return folder


def mixture(folder: Path, weights: Mapping[str, float] = WEIGHTS, **changes: Any) -> TrainingSet:
    specs = [SourceSpec(path=str(folder / name / "train"), weight=weight) for name, weight in weights.items()]
    return TrainingSet(specs, **{"seed": 5, "lanes": LANES, "era": ERA, "stages": STAGES, **changes})


def batches(data: TrainingSet, num_steps: int, *, world_size: int = 1, position: int = 0) -> list[Rows]:
    """The global batches of all ranks: slot i is row i // world_size of rank i % world_size."""
    parts = []
    for rank in range(world_size):
        with Stream(
            data,
            global_rows=GLOBAL_ROWS,
            rank=rank,
            world_size=world_size,
            position=position,
            partner_columns=("second", "document"),
        ) as stream:
            parts.append([step.rows for step in islice(stream, num_steps)])
    return [interleaved(of_ranks) for of_ranks in zip(*parts, strict=True)]


def interleaved(of_ranks: Sequence[Rows]) -> Rows:
    """The rows of all ranks in the order of their slots, without fillers."""
    assert len({len(rows) for rows in of_ranks}) == 1
    # Slot by slot: first row of each rank, second row of each rank, ...; fillers come last.
    slots = [
        np.stack(part, axis=1).reshape(-1, *part[0].shape[1:]) for part in zip(*map(arrays, of_ranks), strict=True)
    ]
    real = slots[-1]
    assert real.sum() == GLOBAL_ROWS
    *columns, sample_id, epoch, real = (array[real] for array in slots)
    return Rows(dict(zip(of_ranks[0].columns, columns, strict=True)), sample_id, epoch, real)


def arrays(rows: Rows) -> list[np.ndarray]:
    return [*rows.columns.values(), rows.sample_id, rows.epoch, rows.real]


def assert_equal(one: Sequence[Rows], two: Sequence[Rows]) -> None:
    for left, right in zip(one, two, strict=True):
        assert np.array_equal(left.sample_id, right.sample_id)
        assert np.array_equal(left.epoch, right.epoch)
        for name, array in left.columns.items():
            assert np.array_equal(array, right.columns[name]), name


@pytest.fixture(scope="module")
def whole(folder: Path) -> list[Rows]:
    return batches(mixture(folder), STEPS)


def sources_of(data: TrainingSet, sample_id: np.ndarray) -> np.ndarray:
    starts = [source.first_sample_id for source in data.sources]
    return np.searchsorted(starts, sample_id, side="right") - 1


def test_every_row_of_every_source_comes_once_in_each_of_its_epochs(folder: Path, whole: list[Rows]) -> None:
    data = mixture(folder)
    sample_id = np.concatenate([rows.sample_id for rows in whole]).astype(np.int64)
    epoch = np.concatenate([rows.epoch for rows in whole])
    pairs = list(zip(epoch.tolist(), sample_id.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)
    placed = data.mixture.place(np.arange(STEPS * GLOBAL_ROWS))
    for number, source in enumerate(data.sources):
        ids = set(range(source.first_sample_id, source.first_sample_id + source.view.num_rows))
        # Some lanes are ahead: an epoch has ended when the last of them is through.
        read = np.bincount(placed.position[placed.source == number] % LANES, minlength=LANES)
        finished = int(read.min()) * LANES // source.view.num_rows
        assert finished >= 3, source.name
        for number in range(finished):
            assert {sample for at, sample in pairs if at == number} & ids == ids


def test_rows_carry_the_content_of_their_identity(folder: Path, whole: list[Rows]) -> None:
    data = mixture(folder)
    contents = [write_pairs(folder / "again" / name, shards).columns for name, shards in SIZES.items()]
    for rows in whole[::10]:
        source = sources_of(data, rows.sample_id.astype(np.int64))
        for at, sample in enumerate(rows.sample_id.astype(np.int64)):
            row = sample - data.sources[source[at]].first_sample_id
            for name, array in contents[source[at]].items():
                assert np.array_equal(rows.columns[name][at], array[row])


@pytest.mark.parametrize("world_size", RANKS[1:])
def test_any_number_of_ranks_sees_the_same_global_batches(folder: Path, whole: list[Rows], world_size: int) -> None:
    assert_equal(batches(mixture(folder), 40, world_size=world_size), whole[:40])


@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_a_run_goes_on_from_any_batch_on_any_number_of_ranks(
    folder: Path, whole: list[Rows], data: st.DataObject
) -> None:
    begin = data.draw(st.integers(0, STEPS - 3), label="batch to go on from")
    world_size = data.draw(st.sampled_from(RANKS), label="ranks")
    resumed = batches(mixture(folder), 3, world_size=world_size, position=begin * GLOBAL_ROWS)
    assert_equal(resumed, whole[begin : begin + 3])


def test_shares_are_shares_of_tokens(folder: Path, tmp_path: Path) -> None:
    """Rows of half the length come twice as often; over whole blocks the shares are exact to a row."""
    short = write_pairs(tmp_path / "short", [200])
    halved = replace(short.manifest, num_tokens=short.manifest.num_tokens // 2)
    halved.save(tmp_path / "short")
    long = write_pairs(tmp_path / "long", [200])
    specs = [SourceSpec(path=str(tmp_path / name), weight=1) for name in ("short", "long")]
    data = TrainingSet(specs, seed=0, lanes=LANES, era=ERA)
    rows = data.mixture.read_before(LANES * BLOCK_ROWS)
    tokens = rows * [halved.num_tokens / 200, long.manifest.num_tokens / 200]
    assert abs(tokens[0] - tokens[1]) <= LANES * long.manifest.num_tokens / 200


def test_epochs_are_counted_for_each_source(folder: Path, whole: list[Rows]) -> None:
    data = mixture(folder)
    sample_id = np.concatenate([rows.sample_id for rows in whole[:50]]).astype(np.int64)
    counts = np.bincount(sources_of(data, sample_id), minlength=3)
    assert data.epochs(50 * GLOBAL_ROWS) == {
        f"epoch_{name}": count / sum(SIZES[name]) for name, count in zip(SIZES, counts, strict=True)
    }
    alone = TrainingSet([SourceSpec(path=str(folder / "wiki" / "train"))], seed=5, lanes=LANES, era=ERA)
    assert alone.epochs(77) == {"epoch": 77 / 154}


def test_the_same_data_listed_twice_is_read_in_two_orders(folder: Path) -> None:
    specs = [SourceSpec(path=str(folder / "wiki" / "train"))] * 2
    data = TrainingSet(specs, seed=5, lanes=LANES, era=ERA)
    assert [source.name for source in data.sources] == ["wiki", "wiki_2"]
    first, second = (source.order.locate(np.arange(154)) for source in data.sources)
    assert not np.array_equal(first.row, second.row)
    sample_id = np.concatenate([rows.sample_id for rows in batches(data, 4)]).astype(np.int64)
    assert len(set(sample_id.tolist())) == len(sample_id), "ids of the two are different numbers"


def test_neither_place_nor_name_of_a_source_changes_the_order(folder: Path, tmp_path: Path, whole: list[Rows]) -> None:
    (tmp_path / "moved").symlink_to(folder / "code" / "train")
    specs = [
        SourceSpec(path=str(folder / "wiki" / "train"), weight=0.5, name="w"),
        SourceSpec(path=str(tmp_path / "moved"), weight=0.3),
        SourceSpec(path=str(folder / "books" / "train"), weight=0.2),
    ]
    stages = [(1000, {"w": 0.1, "books": 0.6})]
    data = TrainingSet(specs, seed=5, lanes=LANES, era=ERA, stages=stages)
    assert data.fingerprint(5000) == mixture(folder).fingerprint(5000)
    assert_equal(batches(data, 30), whole[:30])


def test_the_fingerprint_covers_weights_and_the_stages_that_have_begun(folder: Path) -> None:
    reference = mixture(folder)
    later = mixture(folder, stages=[*STAGES, (2000, {"code": 0.0})])
    assert later.fingerprint(2000) == reference.fingerprint(2000) != later.fingerprint(2001)
    others = [
        mixture(folder, {**WEIGHTS, "code": 0.4}),
        mixture(folder, dict(reversed(WEIGHTS.items()))),
        mixture(folder, seed=6),
        mixture(folder, {"wiki": 1, "code": 1}, stages=[]),
    ]
    assert len({reference.fingerprint(), *(other.fingerprint() for other in others)}) == 5


# ------------------------------------------------------------------------- what is refused


def test_sources_that_do_not_fit_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", [900])
    whole = write_pairs(tmp_path / "other", [50]).manifest
    wiki = SourceSpec(path=str(folder / "wiki" / "train"))
    facts: dict[str, Any] = {"seed": 0, "lanes": LANES, "era": ERA}
    with pytest.raises(DataError, match=r"their kind and columns and facts differ"):
        TrainingSet([wiki, SourceSpec(path=str(tmp_path / "tokens"))], seq_len=35, **facts)
    for change, word in [({"tokenizer_sha256": "0" * 64}, "tokenizer"), ({"labels": ("a", "b")}, "labels")]:
        replace(whole, **change).save(tmp_path / "other")
        with pytest.raises(DataError, match=rf"(?s)cannot be mixed: their {word} differ.*wiki.*other"):
            TrainingSet([wiki, SourceSpec(path=str(tmp_path / "other"))], **facts)


def test_a_source_smaller_than_its_part_of_a_batch_is_refused(folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "tiny" / "train", [8])
    specs = [SourceSpec(path=str(folder / "wiki" / "train")), SourceSpec(path=str(tmp_path / "tiny" / "train"))]
    data = TrainingSet(specs, seed=0, lanes=LANES, era=ERA)
    with pytest.raises(DataError, match=r"(?s)smaller than its part.*tiny.*It has 8 rows; a batch takes 2\d"):
        Stream(data, global_rows=GLOBAL_ROWS, rank=0, world_size=1)


def test_a_source_with_fewer_rows_than_lanes_is_named(folder: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "tiny", [3])
    specs = [SourceSpec(path=str(folder / "wiki" / "train")), SourceSpec(path=str(tmp_path / "tiny"))]
    with pytest.raises(DataError, match=r"4 lanes cannot share 3 rows .*tiny"):
        TrainingSet(specs, seed=0, lanes=LANES, era=ERA)


def test_an_unknown_source_in_a_stage_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"(?s)unknown source 'wikipedia'.*The sources are wiki, code, books"):
        mixture(folder, stages=[(100, {"wikipedia": 1.0})])


def test_sources_are_named_after_their_folders() -> None:
    paths = ["data/wiki/train", "s3://bucket/wiki/train/", "train", "/x/my corpus", "data/wiki"]
    assert source_names([SourceSpec(path=path) for path in paths]) == ["wiki", "wiki_2", "train", "my_corpus", "wiki_3"]
    given = [SourceSpec(path="a/wiki"), SourceSpec(path="b", name="wiki")]
    assert source_names(given) == ["wiki_2", "wiki"]
    with pytest.raises(ConfigError, match="two sources are called 'x'"):
        source_names([SourceSpec(path="a", name="x"), SourceSpec(path="b", name="x")])
