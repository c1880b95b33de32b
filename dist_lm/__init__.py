"""dist_lm: from raw text and machines to a Hugging Face language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_lm.status import Status

__version__ = "0.1.0"
__all__ = ["__version__", "run_training"]


def run_training(config: str | Path, overrides: Sequence[str] = (), *, cpu: int = 0, max_restarts: int = 3) -> Status:
    """What `dist-lm train -c CONFIG [KEY=VALUE]...` does, from Python; returns when the run is done.

    Starts a process a rank on this machine: `cpu` of them with gloo, or one for each GPU that is visible.
    The same call goes on where the run was.  As the processes import the caller's main module, call it
    below `if __name__ == "__main__":`, in the main thread.

    Raises the DistLMError whose exit code `dist-lm train` would have: ConfigError, DataError, StopRequested
    (a checkpoint is saved), RunCrashed and so on.
    """
    # Importing dist_lm stays quick.
    from dist_lm import local_training

    return local_training.run_training(Path(config), overrides, cpu=cpu, max_restarts=max_restarts)
