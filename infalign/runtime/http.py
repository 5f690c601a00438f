"""JSON over HTTP: bounded retries, and never a failure that passes for an answer.

What may pass (no connection, a time-out, 429, 5xx, an answer that is not whole) is tried again with growing pauses;
what will not (any other status) is `Refused` at once. No message holds the API key.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import json
import random
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from infalign.runtime.address import is_loopback

Answer = TypeVar("Answer")
Asked = TypeVar("Asked")

LONGEST_WAIT = 60.0
"""Seconds: no pause between two attempts is longer, whatever the server asks for."""


class Refused(Exception):
    """The server understood and said no: `status` is its HTTP status, the message its words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class Unanswered(Exception):
    """Every attempt failed; the message names the address, the number of attempts and the last problem."""


@dataclass(frozen=True)
class Endpoint:
    """An address, and how it is asked.

    Args:
        url: of the API's root, or of one address.
        timeout: seconds for one request, its whole answer included.
        retries: further attempts after the first.
        api_key: sent as a bearer token; shown nowhere.
        backoff: seconds before the first retry, doubled each time, times a random factor in [0.5, 1.5].
        timeout_name: what the user sets for a longer `timeout`, for messages.
    """

    url: str
    timeout: float = 600.0
    retries: int = 4
    api_key: str | None = field(default=None, repr=False)
    backoff: float = 1.0
    timeout_name: str = "timeout"

    def client(self) -> httpx.AsyncClient:
        """A client for one event loop; a server on this machine is never asked through a proxy."""
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            timeout=None,  # `ask` limits the whole request
            limits=httpx.Limits(max_connections=None),  # whoever asks counts the requests under way
            trust_env=not is_loopback(self.url),
        )

    async def ask(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any] | None, read: Callable[[Any], Answer]
    ) -> Answer:
        """What `read` makes of the JSON that the server answers: a POST of `body`, or a GET.

        Args:
            client: one of `client()`.
            path: below the URL; empty for the URL itself.
            body: JSON values, or None for a GET.
            read: raises ValueError for an answer that is none, which is tried again.

        Raises:
            Refused: a status that no further attempt will change.
            Unanswered: every attempt failed.
        """
        address = f"{self.url}/{path}" if path else self.url
        problem = ""
        for attempt in range(self.retries + 1):
            pause: float | None = None
            try:
                async with asyncio.timeout(self.timeout):
                    response = await client.request("GET" if body is None else "POST", address, json=body)
                if response.is_success:
                    return read(response.json())
                problem = f"HTTP {response.status_code}: {self._words(response)}"
                if response.status_code != 429 and response.status_code < 500:
                    raise Refused(response.status_code, problem)
                pause = _asked_pause(response)
            except TimeoutError:
                problem = f"no answer after {self.timeout:g} s ({self.timeout_name})"
            except httpx.RequestError as error:
                problem = self.hidden(f"{type(error).__name__}: {error}".rstrip(": "))
            except ValueError as error:  # no JSON, or not what was asked for
                problem = f"not a usable answer: {self.hidden(str(error))}"
            if attempt < self.retries:
                drawn = min(self.backoff * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.5)
                await asyncio.sleep(drawn if pause is None else min(pause, LONGEST_WAIT))
        times = "once" if not self.retries else f"{self.retries + 1} times in a row"
        raise Unanswered(f"the server at {address} failed {times} ({problem})")

    def hidden(self, text: str) -> str:
        """A text in one short line, without the API key."""
        text = " ".join(text.split())
        text = text.replace(self.api_key, "<secret>") if self.api_key else text
        return text if len(text) <= 200 else f"{text[:197]}..."

    def _words(self, response: httpx.Response) -> str:
        """What the server says about a failure, in one short line."""
        with contextlib.suppress(ValueError):
            return self.hidden(words_of(response.json()))
        return self.hidden(response.text)


def words_of(content: Any) -> str:
    """What a JSON body says about a failure: the innermost error, message or detail.

    >>> words_of({"error": {"message": "overloaded", "code": 1}})
    'overloaded'
    """
    while isinstance(content, dict) and (keys := {"error", "message", "detail"} & set(content)):
        content = content[min(keys)]
    return content if isinstance(content, str) else json.dumps(content)


async def at_a_time(
    count: int, asked: Sequence[Asked], ask: Callable[[Asked], Coroutine[Any, Any, Answer]]
) -> list[Answer]:
    """`ask` of everything asked, `count` under way at a time, in order; the first that fails cancels the others.

    Raises:
        Exception: of the first that failed.
    """
    free = asyncio.Semaphore(count)

    async def one(item: Asked) -> Answer:
        async with free:
            return await ask(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in asked]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in tasks]


def _asked_pause(response: httpx.Response) -> float | None:
    """Seconds of `Retry-After`, which is a number or a date."""
    asked = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(asked))
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(asked)
        return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None
