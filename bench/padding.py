"""Share of padding of a global batch: as its rows come, sorted by length before it is divided, and packed.

    python bench/padding.py DATA --tokenizer FOLDER [--task classification] [--global 64] [--micro 8] [--batches 50]

Enters: a prepared data set.  Leaves: one line of JSON.  Rows come in training order, on one rank; the
same rows are divided each way.  Packed: task mlm on pairs, where samples can share rows, with a small BERT.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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

    from dist_lm.config import ModelSection
    from dist_lm.config import Task as TaskSettings
    from dist_lm.data.heldout import HeldoutRows
    from dist_lm.data.manifest import Manifest
    from dist_lm.data.rows import Rows
    from dist_lm.data.tokenizer import load_tokenizer
    from dist_lm.data.views import view_of
    from dist_lm.schedule import BatchPlan
    from dist_lm.tasks.base import Task, in_order
    from dist_lm.tasks.registry import build_task

    view, tokenizer = view_of(Manifest.load(arguments.data), None), load_tokenizer(arguments.tokenizer)

    def task_of(**options: Any) -> Task:
        settings = TypeAdapter(TaskSettings).validate_python({"name": arguments.task, **options})
        return build_task(settings, tokenizer, view, 0)

    task = task_of()
    plan = BatchPlan.divide(arguments.global_rows, arguments.micro, 1)
    ways: dict[str, tuple[Task, Callable[[Rows], list[Rows]]]] = {
        "as_they_come": (task, lambda rows: in_order(rows, plan)),
        "by_length": (task, lambda rows: task.divide(rows, plan)),
    }
    if arguments.task == "mlm":
        packing = task_of(packing=True)
        packing.build_model(ModelSection(size="tiny"))
        ways["packed"] = packing, lambda rows: packing.divide(rows, plan)
    batches = HeldoutRows(
        arguments.data,
        rank=0,
        world_size=1,
        micro_rows=arguments.global_rows,
        partner_columns=task.partner_columns,
    )
    shares = {}
    for name, (own, divide) in ways.items():
        tokens = slots = 0
        for _, rows in zip(range(arguments.batches), batches, strict=False):
            for part in divide(rows):
                micro_batch = own.collate(part)
                tokens += micro_batch.tokens
                slots += micro_batch.slots
        shares[name] = round(1 - tokens / slots, 4)
    print(json.dumps({"padding_share": shares, "global": arguments.global_rows, "micro": arguments.micro}))


if __name__ == "__main__":
    main()
