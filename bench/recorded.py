"""A benchmark's figures with what they were taken on.

Enters: figures, and a table in Markdown.  Leaves: a .md file and the JSON beside it, with date, commit,
machine and command.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent


def taken_on() -> dict[str, str]:
    """Date, commit, machine, and the command of this process."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    script = Path(sys.argv[0]).resolve()
    inside = script.relative_to(REPOSITORY) if script.is_relative_to(REPOSITORY) else script
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit.stdout.strip(),
        "machine": f"{os.cpu_count()} cores, CPU, {platform.machine()}",
        "command": " ".join(["python", str(inside), *sys.argv[1:]]),
    }


def record(title: str, table: str, figures: dict[str, Any], out: Path | None) -> None:
    """Print the table; with `out`, write it there and the figures to the .json beside it."""
    facts = taken_on()
    head = f"`{facts['command']}`, {facts['date']}, commit {facts['commit'][:7]}, {facts['machine']}."
    text = f"# {title}\n\n{head}\n\n{table}\n"
    print(text)
    if out:
        out.write_text(text)
        out.with_suffix(".json").write_text(json.dumps({**facts, **figures}, indent=1) + "\n")
