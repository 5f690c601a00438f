"""A reward on a server: batches over HTTP, so many at a time. The key of a recipe is the server's URL.

Two shapes of JSON, both a POST to the URL, one batch a request:

- `infalign`: `{"prompts": [...], "completions": [...], "columns": {"answer": [...]}}` is answered with
  `{"rewards": [0.3, null]}`. Lists have one entry per completion; a chat prompt is a list of messages and its
  completion `[{"role": "assistant", "content": text}]`, else both are texts. `null` is "no score".
- `openrlhf`, that of OpenRLHF's `remote_rm_url`: `{"query": [...], "prompts": [...], "labels": [...]}` is answered
  with `{"rewards": [...]}`. A query is the prompt as the policy sees it with the completion behind it, no end token;
  chats need a `tokenizer`, whose template renders them. Labels are the column `label_column`, else empty texts.

A failure is never a number. A wrong count, a value that is no number, NaN and an infinity are named at once, as is a
refusal (4xx); what may pass (429, 5xx, a time-out, a lost connection) is tried again (`runtime.retry`). The token ids
of completions are not sent: they mean nothing to another model.

Scores are cached under the URL, the shape and `version`, not under what the server runs: raise `version` when its model
changes, or old scores are taken for new ones.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from infalign.rewards.contract import TRAINERS, Text, completion_text
from infalign.rewards.fingerprint import digest
from infalign.runtime.address import address_problem, exposes_key, key_in_environment
from infalign.runtime.console import notice
from infalign.runtime.http import Endpoint, Refused, at_a_time
from infalign.runtime.retry import RetryPolicy
from infalign.types import InputError, RewardError

Shape = Literal["infalign", "openrlhf"]
SHAPES = ("infalign", "openrlhf")


class HTTPReward:
    """A reward on a server, as an async reward function.

    Args:
        url: http:// or https://, without user, password or query.
        concurrency: requests under way at a time.
        batch_size: completions of a request.
        timeout: seconds for one request, its whole answer included.
        retries: further attempts of a request.
        api_key_env: environment variable with the key that is sent as a bearer token; shown and recorded nowhere.
        shape: `infalign` or `openrlhf`.
        version: anything; cached scores of another version are not used.
        columns: which of the data's columns are sent; None for all.
        tokenizer: folder or Hub id of the policy's, for chats in the shape `openrlhf`.
        label_column: the column that goes as `labels`, in the shape `openrlhf`.
        backoff: seconds before the first retry, doubled each time, times a random factor in [0.5, 1.5].
        recipe_dir: folder of the recipe, for a tokenizer's relative path.

    Raises:
        InputError: an option that is not allowed, or no key in the environment.
    """

    tries_again = True

    def __init__(
        self,
        url: str,
        *,
        concurrency: int = 8,
        batch_size: int = 16,
        timeout: float = 60.0,
        retries: int = 4,
        api_key_env: str | None = None,
        shape: Shape = "infalign",
        version: str | float | None = None,
        columns: Sequence[str] | None = None,
        tokenizer: str | Path | None = None,
        label_column: str | None = None,
        backoff: float = 1.0,
        recipe_dir: Path = Path(),
    ) -> None:
        problems = [f"the URL {problem}"] if (problem := address_problem(url)) else []
        problems += option_problems(concurrency=concurrency, batch_size=batch_size, timeout=timeout, retries=retries)
        if shape not in SHAPES:
            problems.append(f"shape is one of {', '.join(SHAPES)}, got {shape!r}")
        if shape == "infalign" and (tokenizer or label_column):
            problems.append("tokenizer and label_column belong to shape: openrlhf")
        if problems:
            raise InputError(f"reward over HTTP: {'; '.join(problems)}")
        key, retry = key_in_environment(api_key_env), RetryPolicy(retries, backoff)
        self.endpoint = Endpoint(url, timeout, retry, key, "reward_kwargs: {timeout: ...}")
        warn_of_key(url, api_key_env)
        self.concurrency, self.batch_size, self.shape = concurrency, batch_size, shape
        self.columns = None if columns is None else list(columns)
        self.label_column, self._tokenizer, self._recipe_dir = label_column, tokenizer, recipe_dir
        self.__name__ = url.rstrip("/").rpartition("/")[2] or "http"
        self.fingerprint = digest("http", 1, url, shape, version, self.columns, str(tokenizer or ""), label_column)

    async def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> NDArray[np.float64]:
        """Scores (B,), NaN where the server gave null.

        Raises:
            RewardError: the server refuses, or answers what is no reward.
            ConnectionError: it does not answer.
        """
        sent = self._sent(columns)
        starts = range(0, len(completions), self.batch_size)
        parts = [slice(start, start + self.batch_size) for start in starts]
        bodies = [
            self._body(prompts[part], completions[part], {name: rows[part] for name, rows in sent.items()})
            for part in parts
        ]
        async with self.endpoint.client() as client:

            async def ask(number: int) -> list[float]:
                count = len(completions[parts[number]])
                read = lambda answer: self._read(answer, count, parts[number].start)  # noqa: E731
                return await self.endpoint.ask(client, "", bodies[number], read)

            try:
                scores = await at_a_time(self.concurrency, range(len(parts)), ask)
            except Refused as refusal:
                raise RewardError(f"the reward server at {self.endpoint.url} refuses: {refusal}") from None
        return np.array([score for batch in scores for score in batch])

    def _sent(self, columns: dict[str, Any]) -> dict[str, Any]:
        """The data's columns that go along."""
        data = {name: rows for name, rows in columns.items() if name not in (*TRAINERS, "completion_ids")}
        wanted = self.columns if self.columns is not None else list(data)
        wanted = wanted if self.shape == "infalign" else [self.label_column] if self.label_column else []
        lacking = [name for name in wanted if name not in data]
        if lacking:
            raise RewardError(
                f"reward over HTTP: the data has no column {lacking[0]!r}; it has {', '.join(data) or 'none'}"
            )
        for name in wanted:
            try:
                json.dumps(data[name], allow_nan=False)
            except (TypeError, ValueError) as error:
                raise RewardError(
                    f"reward over HTTP: the column {name!r} cannot be sent as JSON ({error}): name those to send in "
                    "columns"
                ) from None
        return {name: data[name] for name in wanted}

    def _body(self, prompts: Sequence[Text], completions: Sequence[Text], columns: dict[str, Any]) -> dict[str, Any]:
        if self.shape == "infalign":
            return {"prompts": list(prompts), "completions": list(completions), "columns": columns}
        shown = [self._rendered(prompt) for prompt in prompts]
        queries = [one + completion_text(completion) for one, completion in zip(shown, completions, strict=True)]
        labels = columns[self.label_column] if self.label_column else [""] * len(shown)
        return {"query": queries, "prompts": shown, "labels": list(labels)}

    def _rendered(self, prompt: Text) -> str:
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            raise RewardError(
                "reward over HTTP: OpenRLHF's shape takes texts and the prompts are chats: give tokenizer, the "
                "policy's folder or Hub id, whose template renders them"
            )
        return self.tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)

    @cached_property
    def tokenizer(self) -> Any:
        """What renders chats, loaded when first needed."""
        if self._tokenizer is None:
            return None
        from infalign.models.loading import load_tokenizer, local_path  # noqa: PLC0415 - imports transformers, seconds

        name = str(self._tokenizer)
        return load_tokenizer(str(local_path(name, self._recipe_dir) or name))

    def _read(self, answer: Any, count: int, start: int) -> list[float]:
        """The rewards of one batch, NaN for null; `start` is the first one's index, for messages."""
        rewards = answer.get("rewards") if isinstance(answer, dict) else None
        where = f"the reward server at {self.endpoint.url}"
        if not isinstance(rewards, list):
            got = self.endpoint.hidden(json.dumps(answer))[:80]
            raise RewardError(f'{where} answered {got}; {{"rewards": [a number or null per completion]}} is wanted')
        if len(rewards) != count:
            raise RewardError(f"{where} returned {len(rewards)} rewards for {count} completions")
        for number, value in enumerate(rewards):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                shown = self.endpoint.hidden(json.dumps(value))[:60]
                raise RewardError(
                    f"{where} returned {shown} for completion {start + number}; a finite number is wanted, or null "
                    "for no score"
                )
        return [math.nan if value is None else float(value) for value in rewards]


def option_problems(**options: float) -> list[str]:
    """What is wrong with the options of a client: whole numbers above 0, `retries` also 0, `timeout` in seconds."""
    problems = []
    for name, value in options.items():
        least = 0 if name == "retries" else 1
        if name == "timeout":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                problems.append(f"timeout is seconds above 0, got {value!r}")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            problems.append(f"{name} is a whole number, {least} or more, got {value!r}")
    return problems


def warn_of_key(url: str, variable: str | None) -> None:
    """One warning when a key travels over plain http to another machine."""
    if variable and exposes_key(url):
        notice(f"the API key in {variable} goes to {url} over plain http: use https, or an SSH tunnel")
