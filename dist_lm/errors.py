"""What went wrong, whose fault it is, the exit code, and whether a restart helps.

Enters: four facts (what, where, why, what to do).  Leaves: a message of at most eight lines.
Promises: the exit code of an error class is the same under every launcher.
"""

from __future__ import annotations

from typing import ClassVar

EXIT_DONE = 0
EXIT_CRASH = 1
"""An error that dist_lm did not foresee; a restart may help."""
MAX_MESSAGE_LINES = 8


class DistLMError(Exception):
    """Base of all foreseen errors.  Raise a subclass, never this class."""

    kind: ClassVar[str] = "error"
    exit_code: ClassVar[int] = EXIT_CRASH
    restart_helps: ClassVar[bool] = False
    """True where the same command, run again, can succeed without a person's help."""

    def __init__(self, what: str, *, where: str = "", why: str = "", do: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.why = why
        self.do = do

    def __str__(self) -> str:
        head = self._head()
        lines = [f"{head}   ({self.where})" if self.where else head]
        lines += [f"  {line}" for line in self.why.splitlines()]
        lines += [f"  {line}" for line in self.do.splitlines()]
        if len(lines) > MAX_MESSAGE_LINES:
            # What to do stands last and must survive: the middle is what a reader misses least.
            lines = [*lines[: MAX_MESSAGE_LINES - 2], "  ...", lines[-1]]
        return "\n".join(lines)

    def _head(self) -> str:
        return f"error[{self.kind}] {self.what}"

    def __reduce__(self) -> tuple[object, ...]:
        facts = {"what": self.what, "where": self.where, "why": self.why, "do": self.do}
        return _rebuild, (type(self), facts)


def _rebuild(cls: type[DistLMError], facts: dict[str, str]) -> DistLMError:
    return cls(facts["what"], where=facts["where"], why=facts["why"], do=facts["do"])


class ConfigError(DistLMError):
    """The user's configuration or command line is wrong; nothing was started."""

    kind = "config"
    exit_code = 2


class DataError(DistLMError):
    """The user's data, shards or tokenizer are missing, damaged or do not fit each other."""

    kind = "data"
    exit_code = 3


class EnvironmentFault(DistLMError):
    """The machine lacks something: space, rights, a library, a peer."""

    kind = "environment"
    exit_code = 4


class OutOfMemory(DistLMError):
    """A device or the host has too little memory for this configuration."""

    kind = "memory"
    exit_code = 5


class Stalled(DistLMError):
    """Nothing moved for longer than the limit."""

    kind = "stalled"
    exit_code = 6
    restart_helps = True


class Diverged(DistLMError):
    """Loss or gradients are no longer finite."""

    kind = "diverged"
    exit_code = 7


class StopRequested(DistLMError):
    """Somebody asked the run to stop; a checkpoint is saved.  The same command goes on."""

    kind = "stopped"
    exit_code = 75

    def _head(self) -> str:
        # What a person asked for is no error.
        return self.what
