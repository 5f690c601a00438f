"""What goes over the wire of /v1/completions: the dialects that servers speak, request bodies, and answers.

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

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from infalign.types import SamplingSettings


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
    def one_more(self) -> bool:
        """Whether a token beyond the limit is asked for, to tell a completion that ends at the limit from a cut one."""
        return self.fields == "generation_config"

    @property
    def one_by_one(self) -> bool:
        """Whether requests must not overlap for their seeds to mean anything."""
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


def body(
    dialect: Dialect,
    model: str,
    prompt: Sequence[int] | str,
    settings: SamplingSettings,
    end_ids: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """The request for one completion, every sampling field explicit.

    >>> body(DIALECTS[0], "m", [1, 2], SamplingSettings(5), [0], seed=7)["top_k"]
    -1
    """
    found: dict[str, Any] = {
        "model": model,
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": settings.max_tokens + dialect.one_more,
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
    ids, logps = _tokens(choice)
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


def _tokens(choice: dict[str, Any]) -> tuple[tuple[int, ...] | None, tuple[float, ...] | None]:
    """Token ids and log-probabilities (NaN for none) in the places where servers put them; odd ones count as absent."""
    told = choice["logprobs"] if isinstance(choice.get("logprobs"), dict) else {}
    ids, logps = choice.get("token_ids"), told.get("token_logprobs")
    content, names = told.get("content"), told.get("tokens")
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
