"""JSON over HTTP: bounded retries, and never a failure that passes for an answer.

What may pass is tried again (`runtime.retry`); a status that will not is `Refused` at once. No message holds the API
key.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from infalign.runtime.address import is_loopback
from infalign.runtime.retry import RetryPolicy, announce, may_pass, times

Answer = TypeVar("Answer")
Asked = TypeVar("Asked")


class Refused(Exception):
    """The server understood and said no: `status` is its HTTP status, the message its words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True)
class Endpoint:
    """An address, and how it is asked.

    Args:
        url: of the API's root, or of one address.
        timeout: seconds for one request, its whole answer included.
        retry: how often a request is tried again.
        api_key: sent as a bearer token; shown nowhere.
        timeout_name: what the user sets for a longer `timeout`, for messages.
    """

    url: str
    timeout: float
    retry: RetryPolicy
    api_key: str | None = field(default=None, repr=False)
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
            ConnectionError: every attempt failed; the message names the address, their number and the last problem.
        """
        address = f"{self.url}/{path}" if path else self.url
        attempt = 0
        while True:
            attempt += 1
            try:
                async with asyncio.timeout(self.timeout):
                    response = await client.request("GET" if body is None else "POST", address, json=body)
                return read(response.raise_for_status().json())
            except (TimeoutError, httpx.HTTPError, ValueError) as error:
                failure, problem = error, self._problem(error)
            if isinstance(failure, httpx.HTTPStatusError) and not may_pass(failure):
                raise Refused(failure.response.status_code, problem)
            pause = self.retry.pause(attempt, failure)
            if pause is None:
                raise ConnectionError(f"the server at {address} failed {times(attempt)} ({problem}): see that it runs")
            announce(f"the server at {address}", problem, attempt, self.retry.retries, pause)
            await asyncio.sleep(pause)

    def hidden(self, text: str) -> str:
        """A text in one short line, without the API key."""
        text = " ".join(text.split())
        text = text.replace(self.api_key, "<secret>") if self.api_key else text
        return text if len(text) <= 200 else f"{text[:197]}..."

    def _problem(self, failure: Exception) -> str:
        """A failed attempt, in one short line."""
        if isinstance(failure, TimeoutError):
            return f"no answer after {self.timeout:g} s ({self.timeout_name})"
        if isinstance(failure, httpx.HTTPStatusError):
            text = failure.response.text
            with contextlib.suppress(ValueError):  # no JSON
                text = words_of(failure.response.json())
            return f"HTTP {failure.response.status_code}: {self.hidden(text)}"
        if isinstance(failure, httpx.RequestError):
            return self.hidden(f"{type(failure).__name__}: {failure}".rstrip(": "))
        return f"not a usable answer: {self.hidden(str(failure))}"  # no JSON, or not what was asked for


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
