"""Play a strategy on samples that are already drawn and scored, in a random order: what it would have chosen and spent.

A permutation of independent samples is as good as fresh ones, so this measures any strategy without a model. The very
strategy object decides; nothing of it is written down a second time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from infalign.decoding.strategy import Choose, Course, Draw, Finish, Spent, Strategy
from infalign.types import InputError, Prompt, Sample

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pool:
    """One prompt's samples of one model.

    Attributes:
        samples: M whole completions.
        rewards_M: their rewards, NaN for no score.
        beginnings: by length in tokens, the rewards (M,) of the completions cut there, which early rejection looks at;
            those of completions that are no longer than that are not read.
    """

    samples: Sequence[Sample]
    rewards_M: Floats
    beginnings: Mapping[int, Floats] = field(default_factory=dict)


@dataclass(frozen=True)
class Replayed:
    """What a strategy chose (a place in the pool, None: nothing) and spent, and the base samples it looked at."""

    chosen: int | None
    spent: Spent
    used: tuple[int, ...]
    used_references: tuple[int, ...]


def replay(
    strategy: Strategy,
    prompt: Prompt,
    pool: Pool,
    order: Sequence[int],
    base: Pool,
    base_order: Sequence[int],
    rng: np.random.Generator,
) -> Replayed:
    """One course of a strategy through a pool.

    Args:
        strategy: what is played.
        prompt: the prompt of the pools.
        pool, order: its candidates are `pool`'s samples in this order.
        base, base_order: likewise for the reference samples it may ask for.
        rng: for ties and procedures that draw.

    Raises:
        InputError: it asks for more samples than there are, or for beginnings of a length that was not scored.
    """
    course = Course(prompt, rng)
    used_references: tuple[int, ...] = ()
    while not isinstance(step := course.ask(strategy), Choose):
        if isinstance(step, Finish):
            places = [order[place] for place in step.candidates]
            course.finish(step.candidates, [pool.samples[one] for one in places], pool.rewards_M[places].tolist())
        elif step.reference:
            used_references = tuple(_next(base_order, 0, step.count, strategy))
            places = list(used_references)
            course.refer([base.samples[one] for one in places], base.rewards_M[places].tolist())
        else:
            _draw(step, course, pool, _next(order, len(course.candidates), step.count, strategy), strategy)
    chosen = None if course.chosen is None else order[course.chosen]
    return Replayed(chosen, course.spent, tuple(order[: len(course.candidates)]), used_references)


def _draw(step: Draw, course: Course, pool: Pool, places: Sequence[int], strategy: Strategy) -> None:
    """Candidates from these places, whole or cut."""
    rows, samples = list(places), [pool.samples[one] for one in places]
    if step.tokens is None:
        course.add(samples, pool.rewards_M[rows].tolist(), [True] * len(rows))
        return
    if step.tokens not in pool.beginnings:
        raise InputError(f"{strategy!r} can't be replayed: no rewards of beginnings of {step.tokens} tokens are there")
    whole = [len(one.token_ids) <= step.tokens for one in samples]
    cut = [
        one if is_whole else dataclasses.replace(one, token_ids=one.token_ids[: step.tokens], finished=False)
        for one, is_whole in zip(samples, whole, strict=True)
    ]
    rewards = np.where(whole, pool.rewards_M[rows], pool.beginnings[step.tokens][rows])
    course.add(cut, rewards.tolist(), whole)


def _next(order: Sequence[int], start: int, count: int, strategy: Strategy) -> list[int]:
    if start + count > len(order):
        raise InputError(f"{strategy!r} asks for {start + count} samples of a prompt, and {len(order)} are there")
    return list(order[start : start + count])
