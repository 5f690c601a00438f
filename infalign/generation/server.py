"""A server that completes prompts over HTTP: bounded retries, and never a failure that passes for an answer.

What may pass (no connection, a time-out, 429, 5xx, an answer that is not whole) is tried again with growing pauses;
what will not (any other 4xx) is `Refused` at once. No message holds the API key.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import email.utils
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from infalign.generation.address import is_loopback
from infalign.types import InputError

Answer = TypeVar("Answer")

LONGEST_WAIT = 60.0
"""Seconds: no pause between two attempts is longer, whatever the server asks for."""


class Refused(Exception):
    """The server understood and said no: `status` is its HTTP status, the message its words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


@dataclass(frozen=True)
class Server:
    """Where a model is served, and how it is asked.

    Args:
        url: the API's root, mostly ending with /v1.
        model: the name that the model is served under; None for the only one that the server lists.
        concurrency: requests under way at a time.
        timeout: seconds for one request, its whole answer included.
        retries: further attempts after the first.
        api_key: sent as a bearer token; shown nowhere.
        backoff: seconds before the first retry, doubled each time, times a random factor in [0.5, 1.5].
    """

    url: str
    model: str | None = None
    concurrency: int = 32
    timeout: float = 600.0
    retries: int = 4
    api_key: str | None = field(default=None, repr=False)
    backoff: float = 1.0

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

        Raises:
            Refused: a status that no further attempt will change.
            InputError: every attempt failed; `read` raises ValueError for an answer that is none.
        """
        problem = ""
        for attempt in range(self.retries + 1):
            pause: float | None = None
            try:
                async with asyncio.timeout(self.timeout):
                    response = await client.request("GET" if body is None else "POST", f"{self.url}/{path}", json=body)
                if response.is_success:
                    return read(response.json())
                problem = f"HTTP {response.status_code}: {self._words(response)}"
                if response.status_code != 429 and response.status_code < 500:
                    raise Refused(response.status_code, problem)
                pause = _asked_pause(response)
            except TimeoutError:
                problem = f"no answer after {self.timeout:g} s (server_timeout)"
            except httpx.RequestError as error:
                problem = self._hidden(f"{type(error).__name__}: {error}".rstrip(": "))
            except ValueError as error:  # no JSON, or not what was asked for
                problem = f"not a usable answer: {self._hidden(str(error))}"
            if attempt < self.retries:
                drawn = min(self.backoff * 2**attempt, LONGEST_WAIT) * random.uniform(0.5, 1.5)
                await asyncio.sleep(drawn if pause is None else min(pause, LONGEST_WAIT))
        times = "once" if not self.retries else f"{self.retries + 1} times in a row"
        raise InputError(
            f"the server at {self.url}/{path} failed {times} ({problem}): see that it runs, then run the same command "
            "again; what was sampled is kept"
        )

    async def model_name(self, client: httpx.AsyncClient) -> str:
        """The name to ask for.

        Raises:
            InputError: none is given, and the server does not list exactly one.
        """
        if self.model:
            return self.model
        try:
            names = await self.ask(client, "models", None, _listed)
        except Refused as refusal:
            raise InputError(
                f"{self.url}/models: {refusal}: give the served model's name (served_model_name)"
            ) from None
        if len(names) != 1:
            raise InputError(
                f"the server at {self.url} lists {len(names)} models ({', '.join(names[:8])}): say which with "
                "served_model_name"
            )
        return names[0]

    def _words(self, response: httpx.Response) -> str:
        """What the server says about a failure, in one short line."""
        with contextlib.suppress(ValueError):
            content = response.json()
            while isinstance(content, dict) and (keys := {"error", "message", "detail"} & set(content)):
                content = content[min(keys)]
            return self._hidden(content if isinstance(content, str) else json.dumps(content))
        return self._hidden(response.text)

    def _hidden(self, text: str) -> str:
        text = " ".join(text.split())
        text = text.replace(self.api_key, "<secret>") if self.api_key else text
        return text if len(text) <= 200 else f"{text[:197]}..."


def _listed(content: Any) -> list[str]:
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError("a list of models has a `data`")
    return [str(one["id"]) for one in content["data"] if isinstance(one, dict) and "id" in one]


def _asked_pause(response: httpx.Response) -> float | None:
    """Seconds of `Retry-After`, which is a number or a date."""
    asked = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(asked))
    with contextlib.suppress(ValueError, TypeError):
        moment = email.utils.parsedate_to_datetime(asked)
        return max(0.0, (moment - datetime.datetime.now(datetime.UTC)).total_seconds())
    return None
