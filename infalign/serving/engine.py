"""Decoding for a server: prompts of like settings as one piece of work, stop strings cut before the reward sees them.

A candidate's stream is keyed by (recipe's seed, prompt, request's seed, choice), never by what else is decoded with it:
the same request gets the same answer, up to the rounding of a batch. A request whose seed is the recipe's gets what
`infalign generate` writes for that prompt.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from infalign.decoding.by_procedure import as_strategy
from infalign.decoding.decode import Decoded, Scorer, decode, plan_decoding
from infalign.decoding.strategy import Strategy
from infalign.generation.plan import Request
from infalign.theory.procedures import Procedure
from infalign.types import Prompt, Sample, SamplingSettings


class ServedSampler(Protocol):
    """A sampler whose settings can be set before each batch, and which may ask whom nobody waits for any more."""

    settings: SamplingSettings
    tokenizer: Any
    gone: Callable[[str], bool] | None

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        """One sample a request, in their order."""
        ...


@dataclass(frozen=True)
class Setting:
    """What requests must have in common to be decoded together.

    `stop`: a completion ends before the first of these; `candidates`: N, None for the recipe's own.
    """

    sampling: SamplingSettings
    stop: tuple[str, ...] = ()
    candidates: int | None = None


@dataclass(frozen=True)
class Outcome:
    """A decoded prompt and what it took: `tokens` drawn, those beyond a stop string too, and `reward_calls`."""

    decoded: Decoded
    tokens: int
    reward_calls: int


@dataclass(frozen=True)
class Engine:
    """Draws candidates, scores them and chooses. One thread at a time.

    Args:
        sampler: of the policy; its settings are set for every batch.
        score: rewards of samples, each on its prompt.
        procedure: the procedure or strategy with N candidates, or with the recipe's number (None).
        seed: the recipe's.
        tokens_per_batch: KV-cache tokens a batch may hold.
        reference: of the base policy, for strategies that compare with it.
        remote: whether the sampler asks a server.
    """

    sampler: ServedSampler
    score: Scorer
    procedure: Callable[[int | None], Procedure | Strategy]
    seed: int
    tokens_per_batch: int
    reference: ServedSampler | None = None
    remote: bool = False

    def cost(self, setting: Setting, lengths: Sequence[int]) -> int:
        """KV-cache tokens that prompts of these lengths take."""
        width = as_strategy(self.procedure(setting.candidates)).width
        return sum(width * (length + setting.sampling.max_tokens) for length in lengths)

    def decode(
        self,
        setting: Setting,
        prompts: Sequence[Prompt],
        prompt_ids: Sequence[tuple[int, ...]],
        gone: Callable[[str], bool] = lambda _: False,
    ) -> Iterator[dict[str, Outcome]]:
        """Outcomes by the prompts' keys (which are distinct), a batch at a time.

        A prompt whose key is `gone` (nobody waits for it) takes no further token where the sampler works in this
        process, no reward call, and no batch of its own; its outcome is without meaning, or missing.

        Raises:
            InputError: the server that samples fails, or the strategy can't go on.
            RewardError: the reward does.
        """
        procedure = self.procedure(setting.candidates)
        tokens: Counter[str] = Counter()
        drawing = _drawing(self.sampler, setting, tokens, gone)
        reference = None if self.reference is None else _drawing(self.reference, setting, tokens, gone)
        scoring = _Scoring(self.score, gone)
        by_key = {prompt.key: prompt for prompt in prompts}
        assert len(by_key) == len(prompts)
        batches = plan_decoding(
            prompts,
            prompt_ids,
            procedure,
            max_tokens=setting.sampling.max_tokens,
            tokens_per_batch=self.tokens_per_batch,
        )
        for batch in batches:
            if all(gone(head.key) for head in batch):
                continue
            decoded = next(decode([batch], by_key, drawing, scoring, procedure, self.seed, reference=reference))
            yield {
                head.key: Outcome(one, tokens[head.key], scoring.calls[head.key])
                for head, one in zip(batch, decoded, strict=True)
            }


def stream_key(prompt: str, seed: int, choice: int, own_seed: int) -> str:
    """What a choice's random streams are keyed by; of the recipe's own seed the first is the prompt's own key.

    >>> stream_key("p", 42, 0, own_seed=42), stream_key("p", 7, 1, own_seed=42)
    ('p', 'p/7/1')
    """
    return prompt if (seed, choice) == (own_seed, 0) else f"{prompt}/{seed}/{choice}"


def _drawing(
    sampler: ServedSampler, setting: Setting, tokens: Counter[str], gone: Callable[[str], bool]
) -> _Drawing | _Resuming:
    sampler.settings, sampler.gone = setting.sampling, gone
    plain = _Drawing(sampler, setting.stop, tokens)
    return _Resuming(plain, sampler) if hasattr(sampler, "begin") else plain


@dataclass(frozen=True)
class _Drawing:
    """A sampler with its texts cut at stop strings; counts the tokens drawn, by key."""

    sampler: ServedSampler
    stop: tuple[str, ...]
    tokens: Counter[str]

    @property
    def settings(self) -> SamplingSettings:
        return self.sampler.settings

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        return self.cut(self.sampler.sample(requests))

    def cut(self, samples: Sequence[Sample], begun: Sequence[Sample] = ()) -> list[Sample]:
        for one in samples:
            self.tokens[one.key] += len(one.token_ids)
        for one in begun:
            self.tokens[one.key] -= len(one.token_ids)
        return [cut(one, self.stop, self.sampler.tokenizer) for one in samples]


@dataclass(frozen=True)
class _Resuming:
    """Likewise, a sampler that can stop half-way and go on."""

    plain: _Drawing
    sampler: Any

    @property
    def settings(self) -> SamplingSettings:
        return self.plain.settings

    def sample(self, requests: Sequence[Request]) -> list[Sample]:
        return self.plain.sample(requests)

    def begin(self, requests: Sequence[Request], tokens: int) -> list[Sample]:
        return self.plain.cut(self.sampler.begin(requests, tokens))

    def resume(self, requests: Sequence[Request], begun: Sequence[Sample]) -> list[Sample]:
        return self.plain.cut(self.sampler.resume(requests, begun), begun)


@dataclass
class _Scoring:
    """The reward, with the completions counted that it scores, by key; NaN for those that nobody waits for."""

    score: Scorer
    gone: Callable[[str], bool]
    calls: Counter[str] = field(default_factory=Counter)

    def __call__(self, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> NDArray[np.float64]:
        places = [place for place, one in enumerate(samples) if not self.gone(one.key)]
        rewards = np.full(len(samples), np.nan)
        self.calls.update(samples[place].key for place in places)
        if places:
            rewards[places] = self.score([prompts[place] for place in places], [samples[place] for place in places])
        return rewards


def cut(sample: Sample, stop: Sequence[str], tokenizer: Any) -> Sample:
    """The sample up to its first stop string, as if it had ended there: text, tokens and `finished` agree.

    Its tokens are those it was drawn with as far as they make the text that is left; where the cut goes through a
    token, the tokens of that text.
    """
    place = min((found for one in stop if (found := sample.text.find(one)) >= 0), default=None)
    if place is None:
        return sample
    text, ids = sample.text[:place], sample.token_ids

    def decoded(count: int) -> str:
        return tokenizer.decode(ids[:count], skip_special_tokens=True)

    count = bisect_right(range(len(ids) + 1), place, key=lambda count: len(decoded(count))) - 1
    if count >= 0 and decoded(count) == text:
        kept, logps = ids[:count], sample.token_logps[:count]
    else:
        kept = tuple(tokenizer(text, add_special_tokens=False).input_ids)
        logps = np.full(len(kept), np.nan, dtype=np.float32)
    return dataclasses.replace(sample, text=text, token_ids=kept, token_logps=logps, finished=True)
