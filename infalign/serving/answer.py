"""Answers in OpenAI's shapes: whole, or as server-sent events.

`usage.completion_tokens` counts the tokens of all candidates, which is what the answer took; `usage.infalign` has those
of the chosen ones. With `return_candidates` every choice carries its candidates and their scores in `infalign`.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infalign.serving.engine import Outcome
from infalign.serving.request import CompletionRequest
from infalign.types import Sample


@dataclass(frozen=True)
class Answer:
    """The outcomes of a request, one a choice, prompt by prompt; every one has a chosen completion.

    `prompt_tokens` are those of the prompts, each once; `model` and `fingerprint` say what answers; `notes` say what of
    the request was not done as asked; `token_text` is the text of some tokens.
    """

    ask: CompletionRequest
    outcomes: Sequence[Outcome]
    prompt_tokens: int
    model: str
    fingerprint: str
    token_text: Callable[[Sequence[int]], str]
    notes: Sequence[str] = ()
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = []
        for index, outcome in enumerate(self.outcomes):
            text = _chosen(outcome).text
            message = {"role": "assistant", "content": text, "refusal": None}
            content = {"message": message} if self.ask.messages else {"text": text}
            choices.append(self._last(index, content, outcome))
        told = {"infalign": {"notes": list(self.notes)}} if self.notes else {}
        return {**self._head("chat.completion"), "choices": choices, "usage": self.usage(), **told}

    async def events(self) -> AsyncIterator[str]:
        """The server-sent events of a streamed answer: the chosen text in pieces, usage if asked for, [DONE]."""
        head, include_usage = self._head("chat.completion.chunk"), self.ask.stream_options.include_usage
        if include_usage:
            head["usage"] = None
        for index, outcome in enumerate(self.outcomes):
            texts = pieces(_chosen(outcome).text)
            if self.ask.messages:
                deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts), {}]
                contents = [{"delta": delta} for delta in deltas]
            else:
                contents = [{"text": text} for text in [*texts, ""]]
            for content in contents[:-1]:
                yield _event({**head, "choices": [_choice(index, content, None)]})
            yield _event({**head, "choices": [self._last(index, contents[-1], outcome)]})
        if include_usage:
            yield _event({**head, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, Any]:
        """Tokens: of the prompts, and of all candidates."""
        drawn = sum(outcome.tokens for outcome in self.outcomes)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
            "infalign": {
                "chosen_tokens": sum(len(_chosen(outcome).token_ids) for outcome in self.outcomes),
                "candidates": sum(len(outcome.decoded.candidates) for outcome in self.outcomes),
                "reward_calls": sum(outcome.reward_calls for outcome in self.outcomes),
            },
        }

    def _logprobs(self, sample: Sample) -> dict[str, Any] | None:
        """Of the tokens of a completion, at the temperature that drew it; None where a stop string cut into one."""
        logps = [float(one) for one in sample.token_logps]
        if any(one != one for one in logps):
            return None
        texts = [self.token_text([token]) for token in sample.token_ids]
        if self.ask.messages:
            content = [
                {"token": text, "logprob": logp, "bytes": list(text.encode()), "top_logprobs": []}
                for text, logp in zip(texts, logps, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {"tokens": texts, "token_logprobs": logps, "text_offset": _offsets(texts), "top_logprobs": None}

    def _head(self, chat: str) -> dict[str, Any]:
        return {
            "id": f"{'chatcmpl' if self.ask.messages else 'cmpl'}-{self.name}",
            "object": chat if self.ask.messages else "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _last(self, index: int, content: Mapping[str, Any], outcome: Outcome) -> dict[str, Any]:
        """A choice, or the end of one that is streamed: why it ended, and the candidates if asked for."""
        choice, decoded = _choice(index, content, _reason(_chosen(outcome))), outcome.decoded
        if self.ask.wants_logprobs:
            choice["logprobs"] = self._logprobs(_chosen(outcome))
        if self.ask.infalign.return_candidates:
            candidates = [
                {
                    "text": sample.text,
                    "reward": None if reward != reward else reward,  # NaN: no score
                    "finish_reason": _reason(sample),
                    "tokens": len(sample.token_ids),
                }
                for sample, reward in zip(decoded.candidates, decoded.rewards_N.tolist(), strict=True)
            ]
            choice["infalign"] = {"chosen": decoded.chosen, "seed": self.ask.seed, "candidates": candidates}
        return choice


def _offsets(texts: Sequence[str]) -> list[int]:
    """Where each of some texts begins when they are put together."""
    return [sum(map(len, texts[:place])) for place in range(len(texts))]


def pieces(text: str) -> list[str]:
    """A text in the pieces that it is streamed in: words with the space behind them.

    >>> pieces("two  words ")
    ['two  ', 'words ']
    """
    return re.findall(r"\s*\S+\s*|\s+", text)


def _choice(index: int, content: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    return {"index": index, **content, "logprobs": None, "finish_reason": reason}


def _chosen(outcome: Outcome) -> Sample:
    assert outcome.decoded.chosen is not None
    return outcome.decoded.candidates[outcome.decoded.chosen]


def _reason(sample: Sample) -> str:
    return "stop" if sample.finished else "length"


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
