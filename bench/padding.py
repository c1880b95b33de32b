"""Share of padding with and without sorting a global batch by length before it is divided.

    python bench/padding.py DATA --tokenizer FOLDER [--task classification] [--global 64] [--micro 8] [--batches 50]

Enters: a prepared data set.  Leaves: one line of JSON.  Rows come in training order, on one rank; the
same rows are divided both ways.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dist_lm.worker import prepare_environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--task", default="classification")
    parser.add_argument("--global", dest="global_rows", type=int, default=64)
    parser.add_argument("--micro", type=int, default=8)
    parser.add_argument("--batches", type=int, default=50)
    arguments = parser.parse_args()
    prepare_environment()
    from pydantic import TypeAdapter

    from dist_lm.batches import divide
    from dist_lm.config import Task as TaskSettings
    from dist_lm.data.heldout import HeldoutRows
    from dist_lm.data.manifest import Manifest
    from dist_lm.data.tokenizer import load_tokenizer
    from dist_lm.data.views import view_of
    from dist_lm.schedule import BatchPlan
    from dist_lm.tasks.registry import build_task

    batches = HeldoutRows(arguments.data, rank=0, world_size=1, micro_rows=arguments.global_rows)
    settings = TypeAdapter(TaskSettings).validate_python({"name": arguments.task})
    task = build_task(settings, load_tokenizer(arguments.tokenizer), view_of(Manifest.load(arguments.data), None), 0)
    plan = BatchPlan.divide(arguments.global_rows, arguments.micro, 1)
    shares = {}
    for name, order in (("as_they_come", lambda rows: rows), ("by_length", task.by_length)):
        tokens = slots = 0
        for _, rows in zip(range(arguments.batches), batches, strict=False):
            for part in divide(order(rows), plan):
                micro_batch = task.collate(part)
                tokens += micro_batch.tokens
                slots += micro_batch.slots
        shares[name] = round(1 - tokens / slots, 4)
    print(json.dumps({"padding_share": shares, "global": arguments.global_rows, "micro": arguments.micro}))


if __name__ == "__main__":
    main()
