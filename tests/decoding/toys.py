"""Samplers without a model, whose laws are known, and the way through `decode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from infalign.decoding.decode import Decoded, decode, plan_decoding
from infalign.runtime.seeds import uniforms
from infalign.types import Prompt, Sample, SamplingSettings, prompt_key


def prompts(count: int) -> list[Prompt]:
    return [Prompt(text, prompt_key(text)) for text in (f"prompt {number}" for number in range(count))]


@dataclass
class Levels:
    """Sample `index` is level j with probability `law[j]`, by its own uniform; it has `1 + index` tokens."""

    law: Sequence[float]
    seed: str = "levels"
    batches: list[int] = field(default_factory=list)

    def level(self, key: str, index: int) -> int:
        return int(np.searchsorted(np.cumsum(self.law), uniforms(self.seed, key, index, 1)[0], side="right"))

    def sample(self, requests):
        self.batches.append(len(requests))
        return [
            Sample(one.key, one.index, (1,) * (1 + one.index), np.zeros(1), str(self.level(one.key, one.index)), True)
            for one in requests
        ]


@dataclass
class Digits:
    """Completions of random digits, one a token, that end with a 9 or at `limit`; they can be stopped and resumed."""

    limit: int = 6
    seed: str = "digits"

    @property
    def settings(self) -> SamplingSettings:
        return SamplingSettings(self.limit)

    def _drawn(self, request, length: int) -> Sample:
        digits = [int(10 * u) for u in uniforms(self.seed, request.key, request.index, self.limit)]
        end = digits.index(9) + 1 if 9 in digits else self.limit
        ids = tuple(digits[: min(end, length)])
        return Sample(request.key, request.index, ids, np.zeros(len(ids)), "".join(map(str, ids)), ids[-1] == 9)

    def sample(self, requests):
        return [self._drawn(one, self.limit) for one in requests]

    def begin(self, requests, tokens):
        return [self._drawn(one, tokens) for one in requests]

    def resume(self, requests, begun):
        assert all(self._drawn(r, len(b.token_ids)).token_ids == b.token_ids for r, b in zip(requests, begun))  # noqa: B905
        return self.sample(requests)


@dataclass
class Told:
    """Sample `index` of every prompt is the text of that place."""

    texts: Sequence[str]

    def sample(self, requests):
        return [Sample(one.key, one.index, (1,), np.zeros(1), self.texts[one.index], True) for one in requests]


def number(_, samples) -> np.ndarray:
    """The reward of a text that is a number: its value."""
    return np.array([float(sample.text) for sample in samples])


def run(strategy, sampler, score=number, *, given=None, tokens=400, seed=0, reference=None) -> list[Decoded]:
    """Decode prompts (of one token each), in the order given."""
    given = prompts(3) if given is None else given
    plan = plan_decoding(given, [(1,)] * len(given), strategy, max_tokens=9, tokens_per_batch=tokens)
    by_key = {prompt.key: prompt for prompt in given}
    found = {}
    for batch in decode(plan, by_key, sampler, score, strategy, seed, reference=reference):
        found |= {one.prompt.key: one for one in batch}
    return [found[prompt.key] for prompt in given]
