"""The readers that bench/data.py lets take turns, each in a process of its own.

Enters: a folder with the same tokens in every reader's own format; lines on stdin.  Leaves: for each
line one JSON object on stdout: seconds, tokens, sum of the first tokens.
Promises: a turn is one pass over all tokens, shuffled, as batches [rows, seq_len] of integers; the
sums show that no reader leaves work out.

    python bench/data_readers.py dist_lm FOLDER SEQ_LEN
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

BATCH_ROWS = 256
LANES, ERA = 16, 1024
PARQUET, MDS, RAW, SHARDS = "parquet", "mds", "raw", "shards"
Batches = Callable[[], Iterator[np.ndarray]]


def dist_lm(folder: Path, seq_len: int) -> Batches:
    """The stream of training: lanes and eras, checks of every block, one reader thread, open from epoch to epoch."""
    data = open_training_set(folder, seq_len)
    from dist_lm.data.stream import Stream

    stream = Stream(data, global_rows=BATCH_ROWS, rank=0, world_size=1)
    assert data.num_rows % BATCH_ROWS == 0, "an epoch must be whole batches"
    return lambda: (step.rows.columns["tokens"] for step in islice(stream, data.num_rows // BATCH_ROWS))


def open_training_set(folder: Path, seq_len: int) -> Any:
    from dist_lm.config import SourceSpec
    from dist_lm.data.training_set import TrainingSet

    return TrainingSet([SourceSpec(path=str(folder / SHARDS))], seed=1, lanes=LANES, era=ERA, seq_len=seq_len)


def pread(folder: Path, seq_len: int) -> Batches:
    """The limit: one pread a sample, in a random order, with all offsets known; no check, no format."""
    names = sorted((folder / RAW).glob("*.tokens"))
    files = [os.open(name, os.O_RDONLY) for name in names]
    row_bytes = 2 * seq_len
    places = np.concatenate(
        [
            np.stack([np.full(size // row_bytes, at), np.arange(size // row_bytes) * row_bytes], axis=1)
            for at, size in enumerate(name.stat().st_size for name in names)
        ]
    )

    def batches() -> Iterator[np.ndarray]:
        order = np.random.default_rng(1).permutation(len(places))
        for begin in range(0, len(order), BATCH_ROWS):
            chosen = places[order[begin : begin + BATCH_ROWS]].tolist()
            # Empty: a bytearray would be filled with zeros first.
            batch = np.empty((len(chosen), seq_len), np.uint16)
            view = memoryview(batch.reshape(-1).view(np.uint8))
            for row, (file, offset) in enumerate(chosen):
                os.preadv(files[file], [view[row * row_bytes : (row + 1) * row_bytes]], offset)
            yield batch

    return batches


def hf_streaming(folder: Path, seq_len: int) -> Batches:
    """datasets, streaming from Parquet, NumPy format, its default shuffle buffer, batches by itself."""
    from datasets import load_dataset

    files = sorted(str(path) for path in (folder / PARQUET).glob(f"{seq_len}-*.parquet"))
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True)

    def batches() -> Iterator[np.ndarray]:
        shuffled = stream.with_format("numpy").shuffle(seed=1, buffer_size=1000)
        for batch in shuffled.iter(batch_size=BATCH_ROWS):
            tokens = batch["tokens"]
            yield tokens if tokens.dtype != object else np.stack(list(tokens))

    return batches


def hf_unshuffled(folder: Path, seq_len: int) -> Batches:
    """datasets, streaming, without a shuffle: whole batches come straight out of Arrow."""
    from datasets import load_dataset

    files = sorted(str(path) for path in (folder / PARQUET).glob(f"{seq_len}-*.parquet"))
    stream = load_dataset("parquet", data_files=files, split="train", streaming=True).with_format("numpy")
    return lambda: (batch["tokens"] for batch in stream.iter(batch_size=BATCH_ROWS))


def mosaic_iter(folder: Path, seq_len: int) -> Batches:
    """MosaicML streaming, its iterator, shuffled (py1e), everything predownloaded."""
    dataset = _mosaic(folder, seq_len)

    def batches() -> Iterator[np.ndarray]:
        rows: list[np.ndarray] = []
        for sample in dataset:
            rows.append(sample["tokens"])
            if len(rows) == BATCH_ROWS:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)

    return batches


def mosaic_index(folder: Path, seq_len: int) -> Batches:
    """MosaicML streaming as a map: dataset[i] in a random order."""
    dataset = _mosaic(folder, seq_len)

    def batches() -> Iterator[np.ndarray]:
        order = np.random.default_rng(1).permutation(len(dataset)).tolist()
        for begin in range(0, len(order), BATCH_ROWS):
            yield np.stack([dataset[at]["tokens"] for at in order[begin : begin + BATCH_ROWS]])

    return batches


def _mosaic(folder: Path, seq_len: int) -> Any:
    from streaming import StreamingDataset

    return StreamingDataset(
        local=str(folder / MDS / str(seq_len)), shuffle=True, batch_size=BATCH_ROWS, predownload=1 << 20
    )


def write_mds(folder: Path, seq_len: int) -> None:
    from streaming import MDSWriter

    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    rows = tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)
    columns = {"tokens": f"ndarray:uint16:{seq_len}"}
    with MDSWriter(out=str(folder / MDS / str(seq_len)), columns=columns) as writer:
        for row in rows:
            writer.write({"tokens": np.ascontiguousarray(row)})


READERS: dict[str, Callable[[Path, int], Batches]] = {
    "dist_lm": dist_lm,
    "pread": pread,
    "hf_streaming": hf_streaming,
    "hf_unshuffled": hf_unshuffled,
    "mosaic_iter": mosaic_iter,
    "mosaic_index": mosaic_index,
}


def main() -> None:
    name, folder, seq_len = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    if name == "write_mds":
        write_mds(folder, seq_len)
        return
    batches = READERS[name](folder, seq_len)
    for _ in sys.stdin:
        tokens = checksum = 0
        began = time.perf_counter()
        for batch in batches():
            tokens += batch.size
            checksum += int(batch[:, 0].sum())
        taken = {"seconds": time.perf_counter() - began, "tokens": tokens, "checksum": checksum}
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main()
