"""One rank's process, from its environment to its exit code.

Enters: a configuration and the rank variables that a launcher set.  Leaves: the exit code of
DESIGN's contract.  Promises: an error's message goes to the console of the first rank, its traceback
to the run folder.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
import warnings
from typing import TextIO

from dist_lm import ops
from dist_lm.config_files import LoadedConfig
from dist_lm.errors import EXIT_CRASH, EXIT_DONE, DistLMError, StopRequested
from dist_lm.run_dir import RunDir

log = logging.getLogger(__name__)


def launched_as_rank() -> bool:
    """True in a process that a launcher (ours, deepspeed, torchrun, srun) started as one rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def prepare_environment() -> None:
    """Settings that libraries read when they are imported; a value that is set already stays."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "DS_LOG_LEVEL": "error",
        ops.EXTENSIONS_VARIABLE: str(ops.extensions_folder()),
        # torch's own choice is in the folder for temporary files, which a restart may find empty.
        ops.COMPILED_VARIABLE: str(ops.compiled_folder()),
    }.items():
        os.environ.setdefault(name, value)
    os.environ["PATH"] = ops.own_tools_path()
    # torch 2.13 renames collectives that DeepSpeed calls by their old names.
    warnings.filterwarnings("ignore", message=".*is deprecated.*", category=FutureWarning)
    if "DS_ACCELERATOR" not in os.environ:
        import torch

        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"


def speak(rank: int) -> None:
    """Rank 0 speaks at INFO, every rank at WARNING; libraries at ERROR."""
    handler = _ToStdout()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
    # `deepspeed` and torchrun start ranks by the command line, which has a handler of its own already.
    logging.basicConfig(level=logging.ERROR, handlers=[handler], force=True)
    logging.getLogger("dist_lm").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)


class _ToStdout(logging.StreamHandler[TextIO]):
    """To what sys.stdout is at that moment: the view of a terminal stands in front of it while it is drawn."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    def filter(self, record: logging.LogRecord) -> bool:
        # What the view shows anyway goes to the run folder's log only.
        return not getattr(record, "drawn", False)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stdout


def run_rank(loaded: LoadedConfig, *, launcher: str) -> int:
    """Train as one rank; returns the exit code."""
    prepare_environment()
    _leave_no_shared_memory()
    rank = int(os.environ.get("RANK", "0"))
    speak(rank)
    from dist_lm.ranks import Ranks, disconnect
    from dist_lm.stop import StopFlag
    from dist_lm.summary import summary
    from dist_lm.train import train

    stop = StopFlag()
    stop.listen()
    try:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            ops.remove_stale_locks()
        ranks = Ranks.connect()
        outcome = train(loaded, ranks, stop=stop, launcher=launcher)
        if ranks.is_first:
            log.info("%s", summary(loaded.config, outcome))
        ranks.barrier()
        disconnect()
        return EXIT_DONE
    except StopRequested as error:
        if rank == 0:
            print(error, file=sys.stderr, flush=True)
        return error.exit_code
    except DistLMError as error:
        report_failure(loaded, rank, str(error))
        return error.exit_code
    except Exception as error:
        # Most crashes are those of ranks whose peer died: the local launcher, which sees all ranks,
        # tells the first one.
        message = f"error[crash] {type(error).__name__}: {error}"
        report_failure(loaded, rank, message, tell=launcher != "local")
        return EXIT_CRASH


def _leave_no_shared_memory() -> None:
    """Under its own launcher on a CPU DeepSpeed puts 66 MiB a rank into /dev/shm, for reductions that are
    none of ours, and no run ever takes them away."""
    told = os.environ.pop("LOCAL_SIZE", None)
    if told:
        os.environ.setdefault("LOCAL_WORLD_SIZE", told)


def report_failure(loaded: LoadedConfig, rank: int, message: str, *, tell: bool = True) -> None:
    """Message first, so that a launcher can show it; traceback for people who debug."""
    run_dir = RunDir(loaded.config.run.dir)
    # Nothing is put into a folder that is not a run's own.
    if run_dir.identity.exists():
        attempt = len(list(run_dir.attempts.glob("*.json")))
        path = run_dir.write_error(attempt, rank, f"{message}\n\n{traceback.format_exc()}")
        message = f"{message}\n  traceback: {path}"
    else:
        tell = True
    sys.stdout.flush()
    if tell:
        print(message if rank == 0 else f"[rank {rank}] {message}", file=sys.stderr, flush=True)
