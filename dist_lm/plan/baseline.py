"""What a rank on the CPU holds before it has a model of its own: libraries, and pages of their code.

Enters: nothing but this machine.  Leaves: bytes.
Promises: it is measured, in a process that is forked as ranks are and has done what they do - joined a
process group, multiplied, normalised, stepped an optimizer - and has let go of all that it made for it.

What was read from a library's file counts only once it is used, so that imports alone would say too little.
"""

from __future__ import annotations

import ctypes
import gc
import os
from multiprocessing.connection import Connection
from pathlib import Path

from dist_lm.cluster.rank_process import fork_server
from dist_lm.errors import EnvironmentFault

EXACT_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Variables by which glibc returns freed memory at once.  Without them it keeps what is freed in small
pieces, and more of it the more steps there were."""
_M_MMAP_THRESHOLD = -3
_ROWS, _TOKENS, _VOCABULARY = 8, 64, 1000


def process_bytes() -> int:
    """Raises EnvironmentFault where the measuring process ends badly."""
    context = fork_server()
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(there,))
    process.start()
    there.close()
    try:
        found: int = here.recv()
    except EOFError as error:
        process.join()
        what = f"the process that measures the memory of libraries ended with code {process.exitcode}"
        raise EnvironmentFault(what, do="Run `dist-lm doctor`.") from error
    process.join()
    return found


def _measure(answer: Connection) -> None:
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, int(EXACT_MALLOC["MALLOC_MMAP_THRESHOLD_"]))
    _train_a_little()
    gc.collect()
    answer.send(_resident_bytes())


def _train_a_little() -> None:
    import torch
    from torch import distributed
    from torch._C._distributed_c10d import HashStore
    from transformers import BertConfig, BertForMaskedLM

    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    shape = {"hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 512}
    model = BertForMaskedLM(BertConfig(vocab_size=_VOCABULARY, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.zeros(_ROWS, _TOKENS, dtype=torch.long)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        distributed.all_reduce(torch.ones(_VOCABULARY))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    distributed.destroy_process_group()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
