"""Ranges of parameters from the files of a checkpoint, whatever world size wrote them.

Enters: a Checkpoint.  Leaves: fp32 tensors.  Promises: a range that the checkpoint does not cover is
a DataError; memory is that of the range asked for, and no file is read whole.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from dist_lm.checkpoint.fragments import WEIGHT
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.store import CHUNK_BYTES
from dist_lm.errors import DataError

_LENGTH_BYTES = 8
_FP32_BYTES = 4


class Reader:
    """Reads ranges; keeps the headers of the files that it has seen."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._headers: dict[str, tuple[int, dict[str, Any]]] = {}

    def expect(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise DataError unless the checkpoint holds exactly these parameters."""
        held = {name: tuple(facts["shape"]) for name, facts in self.checkpoint.parameters.items()}
        if held == shapes:
            return
        names = sorted(name for name in {*held, *shapes} if held.get(name) != shapes.get(name))
        first = names[0]
        raise DataError(
            f"the checkpoint is of another model: {len(names)} parameters differ",
            where=self.checkpoint.folder,
            why=f"{first}: saved {held.get(first, 'nothing')}, wanted {shapes.get(first, 'nothing')}",
            do="Use the configuration that the run was begun with.",
        )

    def keys(self) -> set[str]:
        """WEIGHT and the keys of the optimizer's state, of any parameter."""
        return {key for facts in self.checkpoint.parameters.values() for key in facts["keys"]}

    def read(self, name: str, key: str, start: int, size: int) -> Tensor:
        """fp32 tensor [size]: elements start .. start + size of the flattened parameter."""
        result = torch.empty(size, dtype=torch.float32)
        filled = 0
        for begin, length, file in self.checkpoint.parameters[name]["pieces"]:
            low, high = max(begin, start), min(begin + length, start + size)
            if low < high:
                self._read_into(result[low - start : high - start], file, f"{name}|{key}", low - begin)
                filled += high - low
        if filled != size:
            raise DataError(
                f"{name}|{key}: {filled} of {size} elements are in the checkpoint",
                where=self.checkpoint.folder,
                do="Use the checkpoint before it.",
            )
        return result

    def weight(self, name: str) -> Tensor:
        """The whole fp32 parameter in its own shape."""
        shape = self.checkpoint.parameters[name]["shape"]
        return self.read(name, WEIGHT, 0, int(torch.Size(shape).numel())).view(shape)

    def _read_into(self, target: Tensor, file: str, tensor: str, offset: int) -> None:
        try:
            data_at, header = self._header(file)
            at = data_at + header[tensor]["data_offsets"][0] + offset * _FP32_BYTES
            content = target.numpy().data.cast("B")
            for begin in range(0, len(content), CHUNK_BYTES):
                end = min(begin + CHUNK_BYTES, len(content))
                piece = self.checkpoint.read_range(file, at + begin, at + end)
                content[begin:end] = piece
        except (OSError, ValueError, KeyError) as error:
            place = f"{self.checkpoint.folder}/{file}"
            raise DataError(f"{place} cannot be read", why=f"{tensor}: {error!r}") from error

    def _header(self, file: str) -> tuple[int, dict[str, Any]]:
        """Where the data begin, and the tensors of a file."""
        if file not in self._headers:
            length = int.from_bytes(self.checkpoint.read_range(file, 0, _LENGTH_BYTES), "little")
            data_at = _LENGTH_BYTES + length
            self._headers[file] = data_at, json.loads(self.checkpoint.read_range(file, _LENGTH_BYTES, data_at))
        return self._headers[file]
