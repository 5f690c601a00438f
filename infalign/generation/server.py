"""A server that completes prompts over HTTP: `runtime.http` with the model that is served, and what the user does.

A request that keeps failing stops the stage with one message; it is never a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import httpx

from infalign.runtime.http import Endpoint, Refused
from infalign.runtime.retry import RetryPolicy
from infalign.types import InputError

Answer = TypeVar("Answer")


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

    @property
    def endpoint(self) -> Endpoint:
        """Where requests go."""
        return Endpoint(self.url, self.timeout, RetryPolicy(self.retries, self.backoff), self.api_key, "server_timeout")

    def client(self) -> httpx.AsyncClient:
        """A client for one event loop; a server on this machine is never asked through a proxy."""
        return self.endpoint.client()

    async def ask(
        self, client: httpx.AsyncClient, path: str, body: dict[str, Any] | None, read: Callable[[Any], Answer]
    ) -> Answer:
        """What `read` makes of the JSON that the server answers: a POST of `body`, or a GET.

        Raises:
            Refused: a status that no further attempt will change.
            InputError: every attempt failed; `read` raises ValueError for an answer that is none.
        """
        try:
            return await self.endpoint.ask(client, path, body, read)
        except ConnectionError as failure:
            raise InputError(f"{failure}, then run the same command again; what was sampled is kept") from None

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


def _listed(content: Any) -> list[str]:
    if not isinstance(content, dict) or not isinstance(content.get("data"), list):
        raise ValueError("a list of models has a `data`")
    return [str(one["id"]) for one in content["data"] if isinstance(one, dict) and "id" in one]
