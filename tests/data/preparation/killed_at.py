"""A preparation that dies by SIGKILL when it is about to publish its n-th file, or has just done so.

python -m tests.data.preparation.killed_at N before|after OPTIONS_JSON
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from dist_lm.data.prepare import PrepareOptions, prepare

_replace = os.replace


def main() -> None:
    last, moment = int(sys.argv[1]), sys.argv[2]
    published = 0

    def replace(source: Any, target: Any) -> None:
        nonlocal published
        published += 1
        if published == last and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        _replace(source, target)
        if published == last:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    options = json.loads(sys.argv[3])
    options |= {"out": Path(options["out"]), "tokenizer": Path(options["tokenizer"])}
    prepare(PrepareOptions(**options))


if __name__ == "__main__":
    main()
