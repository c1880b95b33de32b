"""This rank's fragments in host memory, ready to be written while training goes on.

Enters: the fragments of a live engine.  Leaves: a safetensors file as a sequence of buffers.
Promises: `take` returns when everything is copied, so that the next step may change the weights; the
one buffer, as large as this rank's share of the fp32 state, is used again for each save, and the
file is written from it without another copy.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dist_lm.checkpoint.fragments import Fragment
from dist_lm.checkpoint.store import CHUNK_BYTES

_FP32_BYTES = 4
_ALIGNMENT = 8


class Snapshot:
    """A host copy of the fragments that one rank owns."""

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._buffer = torch.empty(0)
        self._size = 0
        self._header: dict[str, Any] = {}
        self.pieces: dict[str, dict[str, Any]] = {}
        """Parameter -> shape, keys, start and size of what this rank holds of it."""

    def take(self, fragments: Callable[[], Iterator[Fragment]]) -> None:
        """Copy all fragments; what was held before is overwritten."""
        if not self._fill(fragments()):
            # The first time, and when the optimizer's state grew: count, then copy.
            size = sum(len(fragment.tensors) * fragment.size for fragment in fragments())
            self._buffer = torch.empty(size, pin_memory=self._pinned)
            assert self._fill(fragments()), "the fragments changed while they were copied"
        if self._pinned:
            torch.cuda.synchronize()

    def _fill(self, fragments: Iterator[Fragment]) -> bool:
        """False where the buffer is too small."""
        self._header, self.pieces, self._size = {}, {}, 0
        for fragment in fragments:
            for key, value in fragment.tensors.items():
                begin, end = self._size, self._size + fragment.size
                if end > self._buffer.numel():
                    return False
                self._buffer[begin:end].copy_(value.detach(), non_blocking=self._pinned)
                self._header[f"{fragment.name}|{key}"] = {
                    "dtype": "F32",
                    "shape": [fragment.size],
                    "data_offsets": [begin * _FP32_BYTES, end * _FP32_BYTES],
                }
                self._size = end
            self.pieces[fragment.name] = {
                "shape": list(fragment.shape),
                "keys": sorted(fragment.tensors),
                "start": fragment.start,
                "size": fragment.size,
            }
        return True

    def chunks(self) -> Iterator[memoryview | bytes]:
        """The safetensors file: length of the header, header, data."""
        header = json.dumps(self._header).encode()
        header += b" " * (-len(header) % _ALIGNMENT)
        yield len(header).to_bytes(8, "little") + header
        data = self._buffer[: self._size].numpy().data.cast("B")
        for begin in range(0, len(data), CHUNK_BYTES):
            yield data[begin : begin + CHUNK_BYTES]
