"""Answers in OpenAI's shapes: whole, or as server-sent events.

`usage.completion_tokens` counts the tokens of all candidates, which is what the answer took; `usage.infalign` has those
of the chosen ones. With `return_candidates` every choice carries its candidates and their scores in `infalign`.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from infalign.serving.engine import Outcome
from infalign.serving.request import Ask, Kind
from infalign.types import Sample


@dataclass(frozen=True)
class Answer:
    """The outcomes of a request, one a choice, prompt by prompt; every one has a chosen completion.

    `prompt_tokens` are those of the prompts, each once; `model` and `fingerprint` say what answers.
    """

    ask: Ask
    outcomes: Sequence[Outcome]
    prompt_tokens: int
    model: str
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: secrets.token_hex(12))

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._choice(index, outcome) for index, outcome in enumerate(self.outcomes)]
        return {**self._head(streamed=False), "choices": choices, "usage": self.usage()}

    def events(self) -> Iterator[str]:
        """The server-sent events of a streamed answer: the chosen text in pieces, usage if asked for, [DONE]."""
        kind, head = self.ask.kind, self._head(streamed=True)
        if self.ask.include_usage:
            head["usage"] = None
        for index, outcome in enumerate(self.outcomes):
            chosen = _chosen(outcome)
            opening = {"role": "assistant", "content": ""} if kind == "chat" else None
            contents = [opening] if opening else []
            contents += [{"content": piece} for piece in pieces(chosen.text)]
            for content in contents:
                yield _event({**head, "choices": [_chunk(kind, index, content, None)]})
            last = {**_chunk(kind, index, {}, _reason(chosen)), **self._extension(outcome)}
            yield _event({**head, "choices": [last]})
        if self.ask.include_usage:
            yield _event({**head, "choices": [], "usage": self.usage()})
        yield "data: [DONE]\n\n"

    def usage(self) -> dict[str, Any]:
        """Tokens: of the prompts, and of all candidates."""
        drawn = sum(outcome.tokens for outcome in self.outcomes)
        own = {
            "chosen_tokens": sum(len(_chosen(outcome).token_ids) for outcome in self.outcomes),
            "candidates": sum(len(outcome.decoded.candidates) for outcome in self.outcomes),
            "reward_calls": sum(outcome.reward_calls for outcome in self.outcomes),
        }
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": drawn,
            "total_tokens": self.prompt_tokens + drawn,
            "infalign": own,
        }

    def _head(self, *, streamed: bool) -> dict[str, Any]:
        chat = self.ask.kind == "chat"
        shape = ("chat.completion.chunk" if streamed else "chat.completion") if chat else "text_completion"
        return {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{self.name}",
            "object": shape,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
        }

    def _choice(self, index: int, outcome: Outcome) -> dict[str, Any]:
        chosen = _chosen(outcome)
        content: dict[str, Any] = {"text": chosen.text}
        if self.ask.kind == "chat":
            content = {"message": {"role": "assistant", "content": chosen.text, "refusal": None}}
        return {
            "index": index,
            **content,
            "logprobs": None,
            "finish_reason": _reason(chosen),
            **self._extension(outcome),
        }

    def _extension(self, outcome: Outcome) -> dict[str, Any]:
        if not self.ask.return_candidates:
            return {}
        decoded = outcome.decoded
        rewards = [None if reward != reward else float(reward) for reward in decoded.rewards_N.tolist()]
        candidates = [
            {"text": sample.text, "reward": reward, "finish_reason": _reason(sample), "tokens": len(sample.token_ids)}
            for sample, reward in zip(decoded.candidates, rewards, strict=True)
        ]
        return {"infalign": {"chosen": decoded.chosen, "seed": self.ask.seed, "candidates": candidates}}


def pieces(text: str) -> list[str]:
    """A text in the pieces that it is streamed in: words with the space behind them.

    >>> pieces("two  words ")
    ['two  ', 'words ']
    """
    return re.findall(r"\s*\S+\s*|\s+", text)


def _chunk(kind: Kind, index: int, content: Mapping[str, Any], reason: str | None) -> dict[str, Any]:
    body = {"delta": dict(content)} if kind == "chat" else {"text": content.get("content", "")}
    return {"index": index, **body, "logprobs": None, "finish_reason": reason}


def _chosen(outcome: Outcome) -> Sample:
    assert outcome.decoded.chosen is not None
    return outcome.decoded.candidates[outcome.decoded.chosen]


def _reason(sample: Sample) -> str:
    return "stop" if sample.finished else "length"


def _event(content: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
