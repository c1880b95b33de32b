"""Speed of the data layer beside MosaicML streaming, HF datasets and bare pread, on the same tokens.

Enters: options.  Leaves: a table for people, and as the last line one JSON object.
Promises: every reader is a process of its own (data_readers.py) and reads all tokens once a round, shuffled,
in batches of 256 rows; rounds are interleaved, so that other load meets all alike; a ratio is that of the
best rounds.  Files come from the page cache.  Every reader's tokens are counted, and their first columns
summed: the sums must be equal.

    python bench/data.py --mosaic-python /somewhere/bin/python

mosaicml-streaming wants other versions than this project: install it in an environment of its own, and
name its interpreter; without it, vs_mosaic is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
from data_readers import BATCH_ROWS, ERA, LANES, PARQUET, RAW, SHARDS, open_training_set

READERS = Path(__file__).with_name("data_readers.py")
FILES = 8
MOSAIC = ("mosaic_iter", "mosaic_index")
LENGTHS = (512, 2048)


def write_formats(folder: Path, num_tokens: int, mosaic_python: str) -> float:
    """The same tokens in each reader's format; returns our size on disk as a share of the payload."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from dist_lm.data.kinds.tokens import Tokens
    from dist_lm.data.shards import Column, Manifest, write_shard

    block_tokens = Tokens.block_rows
    tokens = np.random.default_rng(0).integers(0, 50000, num_tokens, dtype=np.uint16)
    np.save(folder / "tokens.npy", tokens)
    for name in (SHARDS, PARQUET, RAW):
        (folder / name).mkdir()
    spec = (Column("tokens", "uint16"),)
    entries = []
    for number, part in enumerate(np.split(tokens, FILES)):
        entries.append(write_shard(folder / SHARDS, number, {"tokens": part}, spec=spec, block_rows=block_tokens))
        (folder / RAW / f"{number}.tokens").write_bytes(part.tobytes())
        for length in LENGTHS:
            rows = pa.FixedSizeListArray.from_arrays(pa.array(part[: len(part) // length * length]), length)
            path = folder / PARQUET / f"{length}-{number}.parquet"
            pq.write_table(pa.table({"tokens": rows}), path, compression="none")
    identity = hashlib.sha256(b"random tokens").hexdigest()
    Manifest("tokens", spec, block_tokens, 1, 50000, identity, num_tokens, num_tokens, tuple(entries)).save(
        folder / SHARDS
    )
    for length in LENGTHS if mosaic_python else ():
        subprocess.run([mosaic_python, READERS, "write_mds", folder, str(length)], check=True, capture_output=True)
    return sum(path.stat().st_size for path in (folder / SHARDS).iterdir()) / (2 * num_tokens)


class Reader:
    """A reader that waits in its process for its next turn."""

    def __init__(self, name: str, folder: Path, seq_len: int, python: str) -> None:
        self.name, self.rates = name, list[float]()
        self.sums: set[tuple[int, int]] = set()
        self._process = subprocess.Popen(
            [python, str(READERS), name, str(folder), str(seq_len)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def turn(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        taken = json.loads(self._process.stdout.readline())
        self.rates.append(taken["tokens"] / taken["seconds"] / 1e6)
        self.sums.add((taken["tokens"], taken["checksum"]))

    def close(self) -> None:
        self._process.communicate()


def rates(folder: Path, seq_len: int, rounds: int, mosaic_python: str) -> dict[str, float]:
    """Best rate of each reader, in Mtok/s."""
    names = ["dist_lm", "pread", "hf_streaming", "hf_unshuffled", *(MOSAIC if mosaic_python else ())]
    readers = [Reader(name, folder, seq_len, mosaic_python if name in MOSAIC else sys.executable) for name in names]
    try:
        for turn in range(rounds):
            for place in range(len(readers)):
                readers[(place + turn) % len(readers)].turn()
    finally:
        for reader in readers:
            reader.close()
    work = {reader.name: reader.sums for reader in readers}
    assert len(set.union(*work.values())) == 1, f"the readers did not read the same tokens: {work}"
    # The first round is the warm-up.
    return {reader.name: max(reader.rates[1:]) for reader in readers}


def resume_ms(folder: Path, rounds: int) -> float:
    """From opening the data set at 90 % of an epoch to the first batch; median."""
    from dist_lm.data.stream import Stream

    taken = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        data = open_training_set(folder, LENGTHS[0])
        position = data.num_rows * 9 // 10 // BATCH_ROWS * BATCH_ROWS
        with Stream(data, global_rows=BATCH_ROWS, rank=0, world_size=1, position=position) as stream:
            next(stream)
            taken.append((time.perf_counter() - began) * 1e3)
    return statistics.median(taken[1:])


def memory_mb(folder: Path) -> tuple[float, float]:
    """What a rank that reads all lanes allocates at most, measured, and the formula of data/eras.py and stream.py."""
    from dist_lm.data.handover import READ_AHEAD
    from dist_lm.data.stream import Stream

    data = open_training_set(folder, LENGTHS[0])
    tracemalloc.start()
    with Stream(data, global_rows=BATCH_ROWS, rank=0, world_size=1) as stream:
        for _ in range(20):
            next(stream)
        measured = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    era_rows = min(ERA, -(-data.num_rows // LANES))
    eras = LANES * era_rows * (data.view.row_bytes + 24)
    return measured / 1e6, (eras + (READ_AHEAD + 2) * BATCH_ROWS * data.view.row_bytes) / 1e6


def growth() -> list[dict[str, float]]:
    """A start on manifests of growing size: opening one, the order of the first and of later batches, memory held.

    The manifests are simulated: they tell of shards that are not there.
    """
    from dist_lm.config import SourceSpec
    from dist_lm.data.kinds.tokens import Tokens
    from dist_lm.data.manifest import Column, Manifest, ShardEntry, shard_name
    from dist_lm.data.training_set import TrainingSet

    grown = []
    for samples, shards in ((10**5, 10), (10**6, 100), (10**7, 1000), (10**7, 10_000)):
        rows = samples // shards * LENGTHS[0]
        blocks = -(-rows // Tokens.block_rows)
        hash_ = hashlib.sha256(b"").hexdigest()
        entries = tuple(
            ShardEntry(shard_name(at), rows, blocks, 2 * rows + 1024 * blocks, hash_, hash_, hash_[:16])
            for at in range(shards)
        )
        spec = (Column("tokens", "uint16"),)
        total = rows * shards
        with tempfile.TemporaryDirectory() as folder:
            manifest = Manifest("tokens", spec, Tokens.block_rows, 1, 50000, hash_, total, total, entries)
            manifest.save(Path(folder))
            del manifest
            source = SourceSpec(path=folder)
            began = time.perf_counter()
            data = TrainingSet([source], seed=1, lanes=LANES, era=ERA, seq_len=LENGTHS[0])
            open_ms = (time.perf_counter() - began) * 1e3
            seconds = []
            for batch in range(50):
                began = time.perf_counter()
                data.sources[0].order.locate(np.arange(batch * BATCH_ROWS, (batch + 1) * BATCH_ROWS))
                seconds.append(time.perf_counter() - began)
            tracemalloc.start()
            data = TrainingSet([source], seed=1, lanes=LANES, era=ERA, seq_len=LENGTHS[0])
            data.sources[0].order.locate(np.arange(BATCH_ROWS))
            held_mb = tracemalloc.get_traced_memory()[0] / 1e6
            tracemalloc.stop()
        later = statistics.median(seconds[1:])
        times = {"open_ms": open_ms, "first_ms": seconds[0] * 1e3, "batch_ms": later * 1e3}
        grown.append({"samples": samples, "shards": shards, **times, "held_mb": held_mb})
    return grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=160_000, help="of 512 tokens")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--mosaic-python", default="", help="interpreter that has mosaicml-streaming")
    parser.add_argument("--skip-preparation", action="store_true")
    options = parser.parse_args()
    # A whole number of batches of either length in every file.
    unit = FILES * max(LENGTHS) * BATCH_ROWS
    num_tokens = options.samples * LENGTHS[0] // unit * unit
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        disk_share = write_formats(folder, num_tokens, options.mosaic_python)
        results["bytes_vs_payload"] = disk_share
        print(f"{num_tokens / 1e6:.1f} M uint16 tokens, {FILES} files, best of {options.rounds - 1} rounds")
        for length in LENGTHS:
            found = rates(folder, length, options.rounds, options.mosaic_python)
            print(f"\n{length} tokens a sample\n{'reader':16}{'Mtok/s':>9}{'dist_lm / reader':>18}")
            for reader, rate in found.items():
                print(f"{reader:16}{rate:9.1f}{found['dist_lm'] / rate:18.2f}")
            suffix = "" if length == LENGTHS[0] else f"_{length}"
            results[f"mtok_s{suffix}"] = ours = found["dist_lm"]
            if options.mosaic_python:
                results[f"vs_mosaic{suffix}"] = ours / max(found[reader] for reader in MOSAIC)
            results[f"vs_hf_streaming{suffix}"] = ours / found["hf_streaming"]
            results[f"vs_hf_unshuffled{suffix}"] = ours / found["hf_unshuffled"]
            results[f"vs_pread{suffix}"] = ours / found["pread"]
        results["resume_ms"] = resume_ms(folder, 9)
        results["memory_mb"], results["memory_formula_mb"] = memory_mb(folder)
    print(f"\nfirst batch at 90 % of an epoch  {results['resume_ms']:.0f} ms (median of 9)")
    memory = f"{results['memory_mb']:.1f} MB, formula {results['memory_formula_mb']:.1f} MB"
    print(f"memory of a rank with all lanes  {memory}")
    print(f"bytes on disk / payload          {results['bytes_vs_payload']:.4f}")
    if not options.skip_preparation:
        from data_preparation import compare_preparation

        ours_rate, theirs = compare_preparation()
        results["prepare_tokens_s_core"], results["prepare_vs_datasets_map"] = ours_rate, ours_rate / theirs
        print(f"preparation, tokens/s a core     {ours_rate:,.0f}; datasets.map {theirs:,.0f}")
    print(f"\n{'samples':>12}{'shards':>8}{'open, ms':>10}{'first batch, ms':>17}{'others, ms':>12}{'held, MB':>10}")
    for row in growth():
        print(
            f"{row['samples']:12,.0f}{row['shards']:8,.0f}{row['open_ms']:10.1f}{row['first_ms']:17.1f}"
            f"{row['batch_ms']:12.2f}{row['held_mb']:10.2f}"
        )
        name = f"_{row['samples']:.0e}_{row['shards']:.0f}".replace("+", "")
        results |= {f"{key}{name}": row[key] for key in ("open_ms", "batch_ms", "held_mb")}
    print(json.dumps({name: round(value, 4) for name, value in results.items()}))


if __name__ == "__main__":
    main()
