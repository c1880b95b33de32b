"""What a check found: a fact, how bad it is, and the remedy.

Enters: facts of a check, or the error that it met.  Leaves: a Finding.
Promises: every finding that is not `ok` says what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dist_lm.errors import DistLMError, EnvironmentFault

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the doctor."""

    level: Level
    check: str
    """A word or two, the same for each finding of a check."""
    what: str
    do: str = ""
    fix: Callable[[], object] | None = None
    """What `--fix` does; only where nothing can be lost by it."""
    exit_code: int = EnvironmentFault.exit_code

    def line(self) -> str:
        remedy = "".join(f"\n      -> {line}" for line in self.do.splitlines())
        return f"{self.level:<4}  {self.check}: {self.what}{remedy}"

    def as_json(self) -> dict[str, Any]:
        return {
            "level": self.level,
            "check": self.check,
            "what": self.what,
            "do": self.do,
            "fixable": self.fix is not None,
        }


def ok(check: str, what: str) -> Finding:
    return Finding("ok", check, what)


def warn(check: str, what: str, do: str, fix: Callable[[], object] | None = None) -> Finding:
    return Finding("warn", check, what, do, fix)


def fail(check: str, what: str, do: str, fix: Callable[[], object] | None = None) -> Finding:
    return Finding("fail", check, what, do, fix)


def of_error(check: str, error: DistLMError) -> Finding:
    """The finding that tells a foreseen error; it ends the doctor with the error's exit code."""
    where = f" ({error.where})" if error.where else ""
    why = f"\n      {'; '.join(error.why.splitlines())}" if error.why else ""
    do = error.do or f"The same error would end a run with exit code {error.exit_code}."
    return Finding("fail", check, f"{error.what}{where}{why}", do, exit_code=error.exit_code)
