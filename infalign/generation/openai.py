"""Sampling from an OpenAI-compatible server: vLLM, SGLang, llama.cpp, transformers serve.

One request a sample, with every sampling field explicit and a seed that follows from (seed, prompt key, sample index);
whether equal seeds give equal samples is up to the server. A prompt travels as token ids where the server takes them,
else as a text that the tokenizer turns into the same ids. Where the server returns no token ids its text is encoded
anew, and special tokens inside a completion are lost. Before the first batch the server's dialect is found out and its
samples are compared with the local model (`served_model.py`).

No two servers take the same fields. What their sources and documentation say; only transformers serve was run:

- vLLM, SGLang: token ids as the prompt, all sampling fields by these names (`top_k` -1 is off), log-probabilities;
  vLLM returns token ids.
- llama.cpp: token ids as the prompt; defaults that truncate (top_k 40, top_p 0.95, min_p 0.05), so that every field
  must be sent; token ids inside `logprobs.content`. Its name is `repeat_penalty`.
- transformers serve: text only, refuses `top_k`, ignores `logprobs`, and samples only when the model's own generation
  config says so (temperature 1.0 alone is greedy): everything has to go into its `generation_config` field. It calls a
  completion cut whose end token is the last one allowed, and seeds one stream for all requests.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import httpx
import numpy as np

from infalign.generation.plan import Request
from infalign.generation.served_model import Agreement, check, compare
from infalign.generation.server import Server
from infalign.runtime.calls import CoroutineRunner
from infalign.runtime.console import notice, say
from infalign.runtime.http import Refused, at_a_time
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
        count = 1 if dialect.of_transformers else self.server.concurrency
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
        body = request_body(dialect, self._model, prompt, settings, self.end_ids, number)
        try:
            answer = await self.server.ask(client, "completions", body, read_answer)
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
        # told with ids they belong to those; of a text encoded anew they fit by their number, its end token aside
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
            if self._dialect.of_transformers and answer.tokens is not None:
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
                    if refusal.status in (401, 403, 404):  # a key, a model or a path that no dialect mends
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
        # the shortest prompts, each in turn: the local model computes one plain forward a sample
        heads = sorted({r.key: r for r in requests}.values(), key=lambda r: (len(r.prompt_ids), r.key))
        heads = heads[:CHECK_PROMPTS]
        probes = [dataclasses.replace(heads[i % len(heads)], index=i) for i in range(CHECK_SAMPLES)]
        samples = self._draw(probes, settings, f"{self.seed}/check")
        found = compare(
            self.local(),
            [request.prompt_ids for request in probes],
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


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dialect:
    """How a server is talked to.

    `ids`: the prompt as token ids, else as text. `fields`: where the sampling fields beyond OpenAI's go, if anywhere.
    `logprobs`: whether log-probabilities are asked for.
    """

    ids: bool
    fields: Literal["extended", "generation_config", "standard"]
    logprobs: bool

    @property
    def of_transformers(self) -> bool:
        """Whether it is that of `transformers serve`.

        A token beyond the limit is asked for, to tell a completion that ends at the limit from a cut one; and requests
        must not overlap for their seeds to mean anything.
        """
        return self.fields == "generation_config"

    def takes(self, settings: SamplingSettings) -> bool:
        """Whether the dialect can say these settings."""
        return self.fields != "standard" or not (settings.top_k or settings.min_p or settings.repetition_penalty != 1.0)

    def describe(self) -> str:
        """In words, for messages."""
        prompt = "prompts as token ids" if self.ids else "prompts as text"
        missing = ", no top_k, min_p or end tokens (its own hold)" if self.fields == "standard" else ""
        return prompt + missing


DIALECTS = (
    Dialect(ids=True, fields="extended", logprobs=True),
    Dialect(ids=True, fields="extended", logprobs=False),
    Dialect(ids=False, fields="extended", logprobs=True),
    Dialect(ids=False, fields="extended", logprobs=False),
    Dialect(ids=False, fields="generation_config", logprobs=False),
    Dialect(ids=True, fields="standard", logprobs=True),
    Dialect(ids=True, fields="standard", logprobs=False),
    Dialect(ids=False, fields="standard", logprobs=True),
    Dialect(ids=False, fields="standard", logprobs=False),
)
"""In the order of preference; a server that ignores fields it does not know takes an early one."""


def request_body(
    dialect: Dialect,
    model: str,
    prompt: Sequence[int] | str,
    settings: SamplingSettings,
    end_ids: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """The request for one completion, every sampling field explicit.

    >>> request_body(DIALECTS[0], "m", [1, 2], SamplingSettings(5), [0], seed=7)["top_k"]
    -1
    """
    found: dict[str, Any] = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": settings.max_tokens + dialect.of_transformers,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": seed,
        "n": 1,
    }
    if dialect.logprobs:
        found["logprobs"] = 1
    if dialect.fields == "extended":
        found |= {
            "top_k": settings.top_k or -1,
            "min_p": settings.min_p or 0.0,
            "repetition_penalty": settings.repetition_penalty,
            "repeat_penalty": settings.repetition_penalty,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(end_ids),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
    if dialect.fields == "generation_config":
        found["generation_config"] = json.dumps(_generation_config(settings, end_ids))
    return found


def _generation_config(settings: SamplingSettings, end_ids: Sequence[int]) -> dict[str, Any]:
    """transformers' own fields; whatever is left out here would be the model's."""
    return {
        "do_sample": True,
        "num_beams": 1,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "top_p": settings.top_p,
        "min_p": settings.min_p or 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": settings.repetition_penalty,
        "no_repeat_ngram_size": 0,
        "eos_token_id": list(end_ids),
        "pad_token_id": end_ids[0] if end_ids else 0,
    }


# --- answers ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """One completion as the server gave it; None for what it did not give.

    `text`; `stopped`: by an end token, not at the limit; `ids`, `logps` (nats) of the generated tokens; how many tokens
    it counted in prompt and completion.
    """

    text: str
    stopped: bool
    ids: tuple[int, ...] | None
    logps: tuple[float, ...] | None
    prompt_tokens: int | None
    tokens: int | None


def read_answer(content: Any) -> Answer:
    """The one completion in an answer.

    Raises:
        ValueError: it holds none, or more than one, or one that did not end by itself or at the limit.
    """
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise ValueError(f"{count} choices where 1 was asked for")
    choice = choices[0]
    if not isinstance(choice.get("text"), str):
        raise ValueError(f"a choice has a text, got {type(choice.get('text')).__name__}")
    if choice.get("finish_reason") not in ("stop", "length"):
        raise ValueError(f"finish_reason is stop or length, got {choice.get('finish_reason')!r}")
    usage = content["usage"] if isinstance(content.get("usage"), dict) else {}
    ids, logps = _told_tokens(choice)
    return Answer(
        text=choice["text"],
        stopped=choice["finish_reason"] == "stop",
        ids=ids,
        logps=logps,
        prompt_tokens=_count(usage.get("prompt_tokens")),
        tokens=_count(usage.get("completion_tokens")),
    )


def _count(told: Any) -> int | None:
    return told if isinstance(told, int) and told > 0 else None


def _told_tokens(choice: dict[str, Any]) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Token ids and log-probabilities (NaN for none) in the places where servers put them; odd ones count as absent."""
    logprobs = choice["logprobs"] if isinstance(choice.get("logprobs"), dict) else {}
    ids, logps = choice.get("token_ids"), logprobs.get("token_logprobs")
    content, names = logprobs.get("content"), logprobs.get("tokens")
    if isinstance(content, list) and all(isinstance(one, dict) for one in content):  # llama.cpp, in the manner of chat
        logps = [one.get("logprob") for one in content]
        ids = ids or [one.get("id") for one in content]
    if ids is None and isinstance(names, list) and all(str(name).startswith("token_id:") for name in names):
        ids = [int(str(name).removeprefix("token_id:")) for name in names]  # vLLM before it had token_ids
    known = isinstance(ids, list) and ids and all(isinstance(one, int) and one >= 0 for one in ids)
    told_all = isinstance(logps, list) and logps and all(isinstance(one, (int, float)) or one is None for one in logps)
    return (
        tuple(ids) if known and ids else None,
        tuple(math.nan if one is None else float(one) for one in logps) if told_all and logps else None,
    )
