"""When a call that failed is tried again, and after what pause: one policy for HTTP requests, rewards and judges.

Most failures may pass: no connection, a time-out, an answer that is not whole, an exception of foreign code. They are
tried again after a pause that doubles. An HTTP status says more than an exception does: 408, 429 and 5xx may pass,
after what `Retry-After` asks for; any other status will be the same next time, so there is no next time.
"""

from __future__ import annotations

import contextlib
import datetime
import email.utils
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from infalign.runtime.console import notice

LONGEST_PAUSE = 60.0
"""Seconds: no pause between two attempts is longer, whatever the server asks for."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often, and after what pauses.

    Args:
        retries: further attempts after the first.
        backoff: seconds before the first retry, doubled each time, times a random factor in [0.5, 1.5].
    """

    retries: int
    backoff: float = 1.0

    def pause(self, attempt: int, failure: BaseException) -> float | None:
        """Seconds before the next attempt, None for no further one.

        Args:
            attempt: the number of the one that failed, from 1.
            failure: what it raised.

        >>> RetryPolicy(retries=2).pause(3, TimeoutError()) is None
        True
        """
        if attempt > self.retries or not may_pass(failure):
            return None
        wait = _retry_after(failure)
        # the random factor keeps many clients of one server from coming back all at once
        pause = self.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.5) if wait is None else wait
        return min(pause, LONGEST_PAUSE)


_ANNOUNCED: set[str] = set()


def announce(what: str, problem: str, attempt: int, retries: int, pause: float) -> None:
    """One warning a process that `what` is tried again after its attempt number `attempt`; later ones are silent.

    Args:
        what: the address or the reward; each is announced once.
        problem: what the attempt failed with.
        attempt, retries, pause: as in `RetryPolicy`.
    """
    if what in _ANNOUNCED:
        return
    _ANNOUNCED.add(what)
    notice(
        f"{what} failed ({problem}): attempt {attempt + 1} of {retries + 1} in {pause:.1f} s; "
        "further retries are not shown"
    )


def may_pass(failure: BaseException) -> bool:
    """Whether a further attempt may succeed where this one failed."""
    status = getattr(_response(failure), "status_code", None)
    return not isinstance(status, int) or status in (408, 429) or status >= 500


def times(attempts: int) -> str:
    """In words, for messages.

    >>> times(1), times(3)
    ('once', '3 times in a row')
    """
    return "once" if attempts == 1 else f"{attempts} times in a row"


def _response(failure: BaseException) -> Any:
    """The HTTP response behind a failure: httpx, requests, openai and huggingface_hub all put it there."""
    return getattr(failure, "response", None)


def _retry_after(failure: BaseException) -> float | None:
    """Seconds that the server asks to wait: `Retry-After` is a number or a date (RFC 9110, 10.2.3)."""
    headers = getattr(_response(failure), "headers", None)
    header = str(headers.get("retry-after", "")) if isinstance(headers, Mapping) else ""
    with contextlib.suppress(ValueError):
        return max(0.0, float(header))
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(header)
        return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None
