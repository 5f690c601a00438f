"""Sampling from an OpenAI-compatible server: vLLM, SGLang, llama.cpp, transformers serve.

One request a sample, with every sampling field explicit and a seed that follows from (seed, prompt key, sample index);
whether equal seeds give equal samples is up to the server. A prompt travels as token ids where the server takes them,
else as a text that the tokenizer turns into the same ids. Where the server returns no token ids its text is encoded
anew, and special tokens inside a completion are lost. Before the first batch the server's dialect is found out and its
samples are compared with the local model (`served_model.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from infalign.generation.plan import Request
from infalign.generation.served_model import Agreement, check, compare
from infalign.generation.server import Refused, Server
from infalign.generation.wire import DIALECTS, Answer, Dialect, body, read_answer
from infalign.runtime.calls import CoroutineRunner
from infalign.runtime.console import notice, say
from infalign.runtime.http import at_a_time
from infalign.runtime.seeds import stream
from infalign.types import InputError, Sample, SamplingSettings

CHECK_PROMPTS, CHECK_SAMPLES, CHECK_TOKENS = 4, 64, 32


class Misread(InputError):
    """A prompt does not reach the served model as it is."""


@dataclass
class OpenAISampler:
    """Draws samples from a served model.

    Args:
        server: where it is served.
        tokenizer: of the recipe's model.
        settings: the sampling distribution.
        end_ids: the tokens that end a completion.
        seed: gives every sample its own, together with prompt key and sample index.
        local: loads the model that should be served, or None to check nothing.
        tolerance: nats that the server's log-probabilities may differ by from the local model's on average.
    """

    server: Server
    tokenizer: Any
    settings: SamplingSettings
    end_ids: tuple[int, ...]
    seed: int | str
    local: Callable[[], Any] | None = None
    tolerance: float = 0.2
    _model: str = field(default="", init=False)
    _dialect: Dialect | None = field(default=None, init=False)
    _logps_hold: bool = field(default=False, init=False)
    _runner: CoroutineRunner = field(default_factory=CoroutineRunner, init=False)

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample a request, in their order; `token_logps` are NaN where the server tells none at our temperature.

        Raises:
            InputError: the server can't be reached, refuses, answers what is no sample, or serves another model.
        """
        if self._dialect is None:
            self._dialect = self._run(self._found_dialect(requests[0]))
            self._check_model(requests)
        samples = self._draw(requests, self.settings, self.seed)
        if self._logps_hold:
            return samples
        return [dataclasses.replace(one, token_logps=np.full_like(one.token_logps, np.nan)) for one in samples]

    # --- drawing ----------------------------------------------------------------------------------------------------

    def _draw(self, requests: Sequence[Request], settings: SamplingSettings, seed: int | str) -> list[Sample]:
        answers = self._run(self._answers(requests, settings, seed))
        return [self._sample(r, a, settings.max_tokens) for r, a in zip(requests, answers, strict=True)]

    async def _answers(self, requests: Sequence[Request], settings: SamplingSettings, seed: int | str) -> list[Answer]:
        """All requests at the server, so many at a time; the first that fails for good cancels the others."""
        dialect = self._dialect
        assert dialect is not None
        count = 1 if dialect.one_by_one else self.server.concurrency
        async with self.server.client() as client:
            return await at_a_time(count, requests, lambda one: self._ask(client, dialect, one, settings, seed))

    async def _ask(
        self,
        client: httpx.AsyncClient,
        dialect: Dialect,
        request: Request,
        settings: SamplingSettings,
        seed: int | str,
    ) -> Answer:
        prompt = request.prompt_ids if dialect.ids else self._as_text(request.prompt_ids)
        number = int(stream(seed, "server", request.key, request.index).integers(2**31))
        content = body(dialect, self._model, prompt, settings, self.end_ids, number)
        try:
            answer = await self.server.ask(client, "completions", content, read_answer)
        except Refused as refusal:
            if self._dialect is None:
                raise
            raise InputError(f"the server at {self.server.url} refuses a request: {refusal}") from None
        if answer.prompt_tokens not in (None, len(request.prompt_ids)):
            raise Misread(
                f"the server at {self.server.url} reads a prompt of {len(request.prompt_ids)} tokens as "
                f"{answer.prompt_tokens}: it adds to it (a template, a BOS) or has another tokenizer: serve the "
                "recipe's model and its tokenizer"
            )
        return answer

    def _as_text(self, ids: Sequence[int]) -> str:
        """The text that the tokenizer turns into exactly these ids, special tokens that it adds itself left out."""
        for start in range(2):
            text = self.tokenizer.decode(ids[start:], clean_up_tokenization_spaces=False)
            if tuple(self.tokenizer(text).input_ids) == tuple(ids):
                return text
        raise Misread(
            f"the server at {self.server.url} takes prompts as text only, and no text encodes to this one's tokens "
            f"({self.tokenizer.decode(ids)[:80]!r}): use a server that takes token ids (vLLM, SGLang, llama.cpp)"
        )

    def _sample(self, request: Request, answer: Answer, limit: int) -> Sample:
        ids, finished = self._tokens(answer, limit)
        logps = np.full(len(ids), np.nan, dtype=np.float32)
        given = answer.logps or ()
        if len(given) == len(answer.ids) if answer.ids is not None else len(ids) - len(given) in (0, 1):
            count = min(len(ids), len(given))  # an end token that is put or cut here has none
            logps[:count] = given[:count]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Sample(request.key, request.index, ids, logps, text, finished)

    def _tokens(self, answer: Answer, limit: int) -> tuple[tuple[int, ...], bool]:
        """The token ids of a completion, end token included, and whether it ended by itself within the limit."""
        assert self._dialect is not None
        ids, finished = answer.ids, answer.stopped
        if ids is None:
            ids = tuple(self.tokenizer(answer.text, add_special_tokens=False).input_ids)
            if self._dialect.one_more and answer.tokens is not None:
                finished = answer.tokens <= limit
        end = next((place for place, token in enumerate(ids) if token in self.end_ids), limit)
        if end < limit:
            return ids[: end + 1], True
        if finished:
            return (*ids, self._end()), True
        if not ids:
            raise InputError(
                f"the server at {self.server.url} returned a completion of special tokens alone, as an empty text: use "
                "a server that returns token ids (vLLM, llama.cpp)"
            )
        return ids[:limit], False

    def _end(self) -> int:
        """The end token of a completion whose own is not told."""
        own = self.tokenizer.eos_token_id
        return own if own in self.end_ids or not self.end_ids else self.end_ids[0]

    # --- before the first batch -------------------------------------------------------------------------------------

    async def _found_dialect(self, request: Request) -> Dialect:
        """The first dialect in which the server completes a prompt by one token.

        Raises:
            InputError: there is none, or the server asks for a key or a model of another name.
        """
        once = dataclasses.replace(self.settings, max_tokens=1)
        refusals: list[str] = []
        async with self.server.client() as client:
            self._model = await self.server.model_name(client)
            for dialect in DIALECTS:
                if not dialect.takes(self.settings):
                    continue
                try:
                    await self._ask(client, dialect, request, once, f"{self.seed}/probe")
                    return dialect
                except Refused as refusal:
                    refusals.append(str(refusal))
                    if refusal.status in (401, 403, 404):
                        break
                except Misread as error:
                    refusals.append(str(error))
        raise InputError(
            f"the server at {self.server.url} does not complete prompts as model {self._model!r} ({refusals[-1]}): see "
            "base_url (mostly ending with /v1), served_model_name, api_key_env and the sampling settings"
        )

    def _check_model(self, requests: Sequence[Request]) -> None:
        """Compare a few samples of the recipe's distribution with the local model, and say what was compared."""
        assert self._dialect is not None
        served = f"model {self._model!r} at {self.server.url}"
        if self.local is None:
            self._logps_hold = self.settings.temperature == 1.0
            notice(f"{served}: not compared with the recipe's model (server_tolerance is unset)")
            return
        settings = SamplingSettings(min(self.settings.max_tokens, CHECK_TOKENS), self.settings.temperature)
        heads = sorted({r.key: r for r in requests}.values(), key=lambda r: (len(r.prompt_ids), r.key))
        heads = heads[:CHECK_PROMPTS]
        asked = [dataclasses.replace(heads[i % len(heads)], index=i) for i in range(CHECK_SAMPLES)]
        samples = self._draw(asked, settings, f"{self.seed}/check")
        found = compare(
            self.local(),
            [request.prompt_ids for request in asked],
            samples,
            temperature=settings.temperature,
            end_ids=self.end_ids,
            rng=stream(self.seed, "check"),
        )
        check(found, self.tolerance, served)
        self._logps_hold = settings.temperature == 1.0 or (found.difference is not None and found.tempered)
        _tell(found, served, self._dialect)

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self._runner.run(work, None)


def _tell(found: Agreement, served: str, dialect: Dialect) -> None:
    """One line: what was compared, and what could not be."""
    ranks = f"{found.tokens} tokens that it drew follow the recipe's model"
    if found.difference is not None:
        say(f"{served}: {dialect.describe()}; {ranks}, log-probabilities within {found.difference:.2g} nats")
    else:
        notice(f"{served}: {dialect.describe()}; {ranks}, but it tells no log-probabilities: those are not compared")
