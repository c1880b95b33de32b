"""Copies of the newest checkpoints' files on the machines themselves, for a quick restart.

Enters: a folder of each machine (memory such as /dev/shm, or a local disk), and the files that its
ranks write.  Leaves: the same files there, each also on the next machine; a checkpoint that is read
from them.
Promises: the store's manifest decides alone what a checkpoint is: a copy is read only where its hash
is the manifest's, the store otherwise; a copy that cannot be written or read is a warning, never an
error of the run.  A rank keeps the last file of its own and the one before.

    RUN_ID/step-00000100-rank-00000.safetensors
"""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from dist_lm import disk
from dist_lm.checkpoint.manifest import Checkpoint
from dist_lm.checkpoint.store import CHUNK_BYTES, Chunks
from dist_lm.ranks import Ranks

log = logging.getLogger(__name__)
_KEPT = 2
"""Copies of one rank's files: of the checkpoint before, too, as the newest may not be published yet."""


class LocalCopies:
    """Copies on this rank's machine, and who of the ranks shares it."""

    def __init__(self, folder: Path, ranks: Ranks, machines: list[list[int]]) -> None:
        self._folder, self._ranks, self._machines = folder, ranks, machines

    @classmethod
    def open(cls, place: str | None, run_id: str, ranks: Ranks) -> LocalCopies | None:
        """A collective call.  `place` may name environment variables: $SLURM_TMPDIR; None: no copies."""
        if place is None:
            return None
        folder = Path(os.path.expandvars(place)).absolute() / run_id
        places = ranks.gather((socket.gethostname(), str(folder)))
        machines = [[rank for rank, other in enumerate(places) if other == one] for one in dict.fromkeys(places)]
        return cls(folder, ranks, machines)

    def path(self, name: str, file: str) -> Path:
        """Of a file of a checkpoint, whatever folders its store has."""
        return self._folder / f"{name}-{file.rpartition('/')[2]}"

    def keep(self, name: str, file: str, chunks: Chunks) -> None:
        """Write a copy, and remove those of the same rank that are too old."""
        path = self.path(name, file)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # A copy that a power cut takes is found by its hash.
            with disk.WholeFile(path, durable=False, hashed=False) as output:
                for chunk in chunks:
                    output.write(chunk)
            for old in sorted(self._folder.glob(f"step-*-{file}"), reverse=True)[_KEPT:]:
                old.unlink()
        except OSError as error:
            log.warning("rank %d cannot keep a copy of its checkpoint nearby: %s", self._ranks.rank, error)

    def neighbours(self) -> list[int]:
        """Ranks of the machine before this one whose files this rank keeps, too."""
        if len(self._machines) == 1:
            return []
        here = next(number for number, ranks in enumerate(self._machines) if self._ranks.rank in ranks)
        own, before = self._machines[here], self._machines[here - 1]
        return [rank for i, rank in enumerate(before) if own[i % len(own)] == self._ranks.rank]

    def near(self, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
        """The checkpoint read from good copies, and the files that must be checked in its store.

        A collective call.  A file that is missing on the machine of the rank that wrote it is sent
        there from the one that has it.
        """
        files = sorted(checkpoint.files)
        held = self._gather_held(checkpoint, files, [set() for _ in range(self._ranks.world_size)])
        if len(files) == self._ranks.world_size:
            held = self._gather_held(checkpoint, self._send_missing(checkpoint, files, held), held)
        # What a rank is going to read: at the same size and with ZeRO its own ranges, else any.
        own_only = len(files) == self._ranks.world_size and checkpoint.progress.zero_stage > 0
        wanted = [[files[rank]] if own_only else files for rank in range(self._ranks.world_size)]
        missing = {file for rank, of_rank in enumerate(wanted) for file in of_rank if file not in held[rank]}
        copies = {file: self.path(checkpoint.name, file) for file in held[self._ranks.rank]}
        unchecked = {*files} - missing - {*copies}
        return replace(checkpoint, near=copies, unchecked=unchecked), sorted(missing)

    def forget_others(self, name: str) -> None:
        """Remove copies of every checkpoint but this one: those of ranks or steps that are no more."""
        try:
            for path in self._folder.glob("step-*"):
                if not path.name.startswith(f"{name}-"):
                    path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("rank %d cannot remove old copies: %s", self._ranks.rank, error)

    def _machine(self, rank: int) -> list[int]:
        return next(ranks for ranks in self._machines if rank in ranks)

    def _gather_held(self, checkpoint: Checkpoint, files: list[str], known: list[set[str]]) -> list[set[str]]:
        """For each rank, the good copies on its machine; the ranks of a machine hash a share each."""
        rank = self._ranks.rank
        own, good = self._machine(rank), {*known[rank]}
        for file in [file for file in files if file not in good][own.index(rank) :: len(own)]:
            path = self.path(checkpoint.name, file)
            if not path.is_file():
                continue
            try:
                matches = disk.sha256_of(path) == checkpoint.files[file]["sha256"]
            except OSError as error:
                log.warning("rank %d cannot read %s: %s", rank, path, error)
                continue
            if matches:
                good.add(file)
            else:
                log.warning("%s is damaged, its checkpoint's store is read instead", path)
        found = self._ranks.gather(good)
        return [set().union(*(found[other] for other in self._machine(rank))) for rank in range(len(found))]

    def _send_missing(self, checkpoint: Checkpoint, files: list[str], held: list[set[str]]) -> list[str]:
        """To each rank its own file, from the first that has it; all ranks go through the same list.

        Returns what was sent.
        """
        sent = []
        for rank, file in enumerate(files):
            holder = next((other for other, of_other in enumerate(held) if file in of_other), None)
            if file not in held[rank] and holder is not None:
                self._send(checkpoint, file, holder, rank)
                sent.append(file)
        return sent

    def _send(self, checkpoint: Checkpoint, file: str, holder: int, to: int) -> None:
        group, path, size = self._ranks.host_group, self.path(checkpoint.name, file), checkpoint.files[file]["bytes"]
        sizes = [min(CHUNK_BYTES, size - begin) for begin in range(0, size, CHUNK_BYTES)]
        if self._ranks.rank == holder:
            with path.open("rb") as content:
                for length in sizes:
                    dist.send(torch.frombuffer(bytearray(content.read(length)), dtype=torch.uint8), to, group=group)
        elif self._ranks.rank == to:
            arriving = (self._received(length, holder) for length in sizes)
            self.keep(checkpoint.name, file.rpartition("/")[2], arriving)
            # Whatever the disk said: the sender waits until everything was taken.
            for _ in arriving:
                pass
            log.info("rank %d took %s from rank %d's machine", to, path.name, holder)

    def _received(self, length: int, holder: int) -> memoryview:
        buffer = torch.empty(length, dtype=torch.uint8)
        dist.recv(buffer, holder, group=self._ranks.host_group)
        return buffer.numpy().data
