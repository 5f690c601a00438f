"""Deploy a policy with the decoder that it was aligned for: draw candidates, score them, choose one.

A procedure draws its n candidates in one round; a strategy draws round by round, prompt by prompt as many as it wants.
A round is one batch to the sampler and one to the reward, whatever the prompts of a batch ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from infalign.decoding.by_procedure import as_strategy
from infalign.decoding.strategy import Choose, Course, Draw, Finish, Spent, Step, Strategy
from infalign.generation.plan import Request, Sampler, plan_batches
from infalign.runtime.seeds import stream
from infalign.theory.procedures import Procedure
from infalign.types import InputError, Prompt, Sample, SamplingSettings

Scorer = Callable[[Sequence[Prompt], Sequence[Sample]], NDArray[np.float64]]


@dataclass(frozen=True)
class Decoded:
    """The chosen completion of a prompt, with all its candidates, their rewards and what they cost.

    Rewards are NaN for no score, and for candidates that were given up half-way (early rejection). `chosen` is None
    when no candidate has a score.
    """

    prompt: Prompt
    chosen: int | None
    candidates: tuple[Sample, ...]
    rewards_N: NDArray[np.float64]
    spent: Spent = field(default_factory=Spent)

    @property
    def text(self) -> str | None:
        """The chosen completion."""
        return None if self.chosen is None else self.candidates[self.chosen].text


class ResumingSampler(Sampler, Protocol):
    """A sampler that can stop half-way and go on, as `infalign.generation.hf.HFSampler` can."""

    settings: SamplingSettings

    def begin(self, requests: Sequence[Request], tokens: int) -> list[Sample]:
        """The first `tokens` tokens of what `sample` would draw."""
        ...

    def resume(self, requests: Sequence[Request], begun: Sequence[Sample]) -> list[Sample]:
        """What `sample` would draw, given its beginnings."""
        ...


def plan_decoding(
    prompts: Sequence[Prompt],
    prompt_ids: Sequence[tuple[int, ...]],
    procedure: Procedure | Strategy,
    *,
    max_tokens: int,
    tokens_per_batch: int,
) -> list[list[Request]]:
    """Batches of whole prompts, one request each: the same list in every run and on every rank.

    Args:
        prompts, prompt_ids: the prompts and their tokens as the model sees them.
        procedure: a procedure or a strategy: at most `width` samples a prompt will be drawn at a time (a procedure's
            n).
        max_tokens: the sampler's length limit.
        tokens_per_batch: KV-cache tokens a batch may hold.
    """
    heads = [Request(prompt.key, 0, tuple(ids)) for prompt, ids in zip(prompts, prompt_ids, strict=True)]
    return plan_batches(heads, max_tokens, max(1, tokens_per_batch // as_strategy(procedure).width))


def decode(
    batches: Sequence[Sequence[Request]],
    by_key: Mapping[str, Prompt],
    sampler: Sampler,
    score: Scorer,
    procedure: Procedure | Strategy,
    seed: int = 0,
    *,
    reference: Sampler | None = None,
) -> Iterator[list[Decoded]]:
    """Decode batches of prompts with a procedure or a strategy, one after the other.

    Args:
        batches: of `plan_decoding`.
        by_key: the prompts.
        sampler: draws the candidates; for early rejection a `ResumingSampler`.
        score: rewards of samples, each on its prompt.
        procedure: what draws and chooses.
        seed: of tie-breaking and of random procedures; keyed by prompt, so order and batches do not matter.
        reference: draws from the base policy, for strategies that compare with it (rejection). Its random streams must
            not be the sampler's.

    Raises:
        InputError: a strategy that the sampler can't serve, or that asks for what it may not.
    """
    strategy = as_strategy(procedure)
    for batch in batches:
        courses = [Course(by_key[head.key], stream(seed, "decode", head.key)) for head in batch]
        going = list(zip(batch, courses, strict=True))
        while going:
            questions = [(head, course, course.ask(strategy)) for head, course in going]
            going = [(head, course) for head, course, step in questions if not isinstance(step, Choose)]
            _play([one for one in questions if not isinstance(one[2], Choose)], sampler, reference, score, strategy)
        yield [Decoded(one.prompt, one.chosen, tuple(one.candidates), one.whole_rewards, one.spent) for one in courses]


Asked = tuple[Request, Course, Step]


@dataclass(frozen=True)
class _Row:
    """A sample that a round draws: `how` is "whole", "begin", "finish" or "reference"."""

    request: Request
    course: Course
    how: str
    tokens: int | None


def _play(
    asked: Sequence[Asked], sampler: Sampler, reference: Sampler | None, score: Scorer, strategy: Strategy
) -> None:
    """One round: draw what every prompt asks for, score it all in one call, and tell the courses."""
    rows = [row for one in asked for row in _rows(*one)]
    if not rows:
        return
    drawn: dict[int, Sample] = {}
    for kind in dict.fromkeys((row.how, row.tokens) for row in rows):
        places = [place for place, row in enumerate(rows) if (row.how, row.tokens) == kind]
        source = reference if kind[0] == "reference" else sampler
        drawn |= zip(places, _draw([rows[place] for place in places], source, strategy), strict=True)
    samples = [drawn[place] for place in range(len(rows))]
    rewards = score([row.course.prompt for row in rows], samples)
    start = 0
    for one in asked:
        end = start + len(_rows(*one))
        _tell(one, samples[start:end], rewards[start:end].tolist(), sampler)
        start = end


def _rows(head: Request, course: Course, step: Step) -> list[_Row]:
    """The samples that a step asks for."""
    if isinstance(step, Finish):
        how, places, tokens = "finish", list(step.candidates), None
    else:
        assert isinstance(step, Draw)
        first = 0 if step.reference else len(course.candidates)
        how = "reference" if step.reference else "whole" if step.tokens is None else "begin"
        places, tokens = list(range(first, first + step.count)), step.tokens
    return [_Row(Request(head.key, place, head.prompt_ids), course, how, tokens) for place in places]


def _draw(rows: Sequence[_Row], source: Sampler | None, strategy: Strategy) -> list[Sample]:
    """The samples of rows that are drawn alike, as one batch."""
    requests, how, tokens = [row.request for row in rows], rows[0].how, rows[0].tokens
    if source is None:
        raise InputError(f"{strategy!r} compares with base samples: decode needs reference, a sampler of the base")
    if how in ("whole", "reference"):
        return source.sample(requests)
    if not hasattr(source, "begin"):
        raise InputError(
            f"{strategy!r} stops completions half-way and goes on with some, which {type(source).__name__} can't: "
            "sample in process (generation: transformers), or use another strategy"
        )
    resuming: ResumingSampler = source  # pyright: ignore[reportAssignmentType] - it has just been looked at
    if how == "begin":
        assert tokens is not None
        return resuming.begin(requests, tokens)
    return resuming.resume(requests, [row.course.candidates[row.request.index] for row in rows])


def _tell(one: Asked, samples: Sequence[Sample], rewards: Sequence[float], sampler: Sampler) -> None:
    """Hand a prompt's share of a round to its course."""
    _, course, step = one
    if isinstance(step, Finish):
        course.finish(step.candidates, samples, rewards)
    elif isinstance(step, Draw) and step.reference:
        course.refer(samples, rewards)
    elif isinstance(step, Draw):
        limit = None if step.tokens is None else sampler.settings.max_tokens  # pyright: ignore[reportAttributeAccessIssue]
        whole = [limit is None or one.finished or len(one.token_ids) >= limit for one in samples]
        course.add(samples, rewards, whole)
