"""Trying again: which failures of storage pass by themselves, and how long to wait for it.

Enters: a call to storage and what it raised.  Leaves: its result, or an error that names the place.
Promises: waits grow exponentially, with jitter, up to a limit, and a server's Retry-After is
honoured; what another try cannot change is raised at once; no message holds a secret of the URL.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from dist_lm.data.location import redact, scrub
from dist_lm.errors import DistLMError, EnvironmentFault

log = logging.getLogger(__name__)
Result = TypeVar("Result")

_PASSING_STATUS = frozenset({408, 425, 429})
"""With all of 500 and above."""
_FINAL = (PermissionError, IsADirectoryError, NotADirectoryError, TypeError, ValueError, NotImplementedError)


@dataclass(frozen=True)
class Retries:
    """How patient a reader is.  The functions are injected by tests."""

    attempts: int = 10
    """Tries without any progress, the first one included."""
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    stall_s: float = 30.0
    """A server that sends nothing for so long has failed."""
    sleep: Callable[[float], None] = time.sleep
    random: Callable[[], float] = random.random
    now: Callable[[], float] = time.time
    """Seconds since 1970, for a Retry-After that names a date."""

    def wait_s(self, failures: int, retry_after: str | None) -> float:
        """How long to wait after the last of so many failures in a row."""
        longest = min(self.first_wait_s * 2.0 ** (failures - 1), self.max_wait_s)
        # Between half and all of it: ranks that failed together must not come back together.
        jittered = longest * (0.5 + 0.5 * self.random())
        return max(jittered, min(self._asked_s(retry_after), self.max_wait_s))

    def _asked_s(self, retry_after: str | None) -> float:
        if not retry_after:
            return 0.0
        try:
            return float(retry_after)
        except ValueError:
            pass
        try:
            return parsedate_to_datetime(retry_after).timestamp() - self.now()
        except ValueError:
            return 0.0


class Failures:
    """The failures of one piece of work, one after the other."""

    def __init__(self, location: str, retries: Retries, doing: str) -> None:
        self._location, self._retries, self._doing = location, retries, doing
        self._count = 0

    def progress(self) -> None:
        """Something came through: the count begins anew."""
        self._count = 0

    def wait(self, error: Exception) -> None:
        """Wait before the next try, or raise: FileNotFoundError, or an EnvironmentFault."""
        status = status_of(error)
        if isinstance(error, FileNotFoundError) or status in (404, 410):
            # Outside the handler of the library's error: its text may hold secrets.
            raise FileNotFoundError(redact(self._location)) from None
        if isinstance(error, DistLMError):
            raise error
        self._count += 1
        words = f"{type(error).__name__}: {scrub(str(error), self._location)}"[:300]
        if not _may_pass(error, status):
            raise self._fault(words, "") from None
        if self._count >= self._retries.attempts:
            raise self._fault(words, f"{self._count} attempts failed, one after the other.") from None
        seconds = self._retries.wait_s(self._count, _header_of(error, "Retry-After"))
        log.info("cannot %s %s (%s); again in %.1f s", self._doing, redact(self._location), words, seconds)
        self._retries.sleep(seconds)

    def _fault(self, words: str, tried: str) -> EnvironmentFault:
        return EnvironmentFault(
            f"cannot {self._doing} storage",
            where=redact(self._location),
            why=f"{words}\n{tried}".strip(),
            do="Look at the address, the credentials and the network; then run the same command again.",
        )


def persist(work: Callable[[], Result], location: str, retries: Retries, doing: str) -> Result:
    """The result of `work`, tried until it succeeds or cannot."""
    failures = Failures(location, retries, doing)
    while True:
        try:
            return work()
        except Exception as error:
            failure = error
        failures.wait(failure)


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status that a library's error stands for, if it tells."""
    for name in ("status", "status_code", "code"):
        value = getattr(error, name, None)
        if isinstance(value, int):
            return value
    response = _boto_response(error)
    if response is not None:
        status = response.get("HTTPStatusCode")
        return int(status) if status is not None else None
    return None


def _may_pass(error: Exception, status: int | None) -> bool:
    if status is not None:
        return status >= 500 or status in _PASSING_STATUS
    if isinstance(error, _FINAL):
        return False
    # Libraries name what no retry cures by their own words: missing or wrong credentials.
    return "Credential" not in type(error).__name__


def _header_of(error: BaseException, name: str) -> str | None:
    headers = getattr(error, "headers", None)
    if headers is None:
        headers = (_boto_response(error) or {}).get("HTTPHeaders", {})
        name = name.lower()
    value = headers.get(name) if hasattr(headers, "get") else None
    return None if value is None else str(value)


def _boto_response(error: BaseException | None) -> dict[str, Any] | None:
    """What S3 answered: s3fs raises an OSError caused by the error of botocore."""
    for candidate in (error, getattr(error, "__cause__", None)):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            metadata = response.get("ResponseMetadata")
            return metadata if isinstance(metadata, dict) else None
    return None
