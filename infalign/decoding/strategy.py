"""What a decoding strategy says and sees: one prompt's course, step by step, and what it has cost.

A strategy is asked again and again what to do for one prompt: `Draw` further candidates, `Finish` begun ones, or
`Choose`. It is asked about every prompt on its own, so that what it decides depends on no other prompt and on no batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from infalign.runtime.calls import own_copy
from infalign.types import InputError, Prompt, Sample

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Draw:
    """Draw `count` further candidates; with `tokens`, only their first so many tokens.

    With `reference` they are samples of the base policy, scored to compare with and never chosen.
    """

    count: int
    tokens: int | None = None
    reference: bool = False


@dataclass(frozen=True)
class Finish:
    """Draw the rest of these begun candidates (their places), and score them whole."""

    candidates: tuple[int, ...]


@dataclass(frozen=True)
class Choose:
    """The candidate (its place) that is the answer; None when there is none to choose."""

    candidate: int | None


Step = Draw | Finish | Choose


@dataclass(frozen=True)
class Seen:
    """What a strategy knows of a prompt when it is asked.

    Attributes:
        prompt: the prompt.
        candidates: everything drawn so far, in order.
        rewards_N: their rewards as they stand, a begun one's for its beginning; NaN is "no score".
        whole_N: False where only a beginning is drawn.
        references_K: rewards of the base samples asked for with `Draw(reference=True)`; None before that.
        rng: the prompt's own generator, for ties and for procedures that draw.
    """

    prompt: Prompt
    candidates: tuple[Sample, ...]
    rewards_N: Floats
    whole_N: NDArray[np.bool_]
    references_K: Floats | None
    rng: np.random.Generator


class Strategy(Protocol):
    """How candidates are drawn and one is chosen. Its repr names it in files: everything that matters is in it."""

    @property
    def n(self) -> int:
        """The most candidates it draws for a prompt."""
        ...

    @property
    def width(self) -> int:
        """The most samples of a prompt that it draws in one step: batches of prompts are cut to fit."""
        ...

    def step(self, seen: Seen) -> Step:
        """What to do next for a prompt: a function of what was seen of it alone."""
        ...


@dataclass(frozen=True)
class Spent:
    """What decoding a prompt has cost.

    Attributes:
        candidates: completions begun.
        references: base samples drawn to compare with.
        tokens: tokens generated, end tokens and references included; a continued completion's count once. Reading
            prompts (and, to continue, what is there already) is not counted.
        reward_calls: completions, beginnings and references that were scored.
        scored_tokens: the completion tokens that the reward was handed.
    """

    candidates: int = 0
    references: int = 0
    tokens: int = 0
    reward_calls: int = 0
    scored_tokens: int = 0

    def __add__(self, other: Spent) -> Spent:
        return Spent(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


@dataclass
class Course:
    """One prompt's way through a strategy. Whoever draws and scores tells it with `add`, `refer` and `finish`."""

    prompt: Prompt
    rng: np.random.Generator
    candidates: list[Sample] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    references: list[float] | None = None
    spent: Spent = field(default_factory=Spent)
    chosen: int | None = None

    def ask(self, strategy: Strategy) -> Step:
        """The strategy's next step.

        Raises:
            InputError: the strategy asks for what it may not: it would never end, or exceed its own n.
        """
        seen = Seen(
            # copies: a strategy may change what it is shown, and the next one must not see that
            dataclasses.replace(
                self.prompt, content=own_copy(self.prompt.content), columns=own_copy(dict(self.prompt.columns))
            ),
            tuple(self.candidates),
            np.array(self.rewards, dtype=np.float64),
            np.array(self.whole, dtype=bool),
            None if self.references is None else np.array(self.references, dtype=np.float64),
            self.rng,
        )
        step = strategy.step(seen)
        problem = self._problem(step, strategy)
        if problem:
            raise InputError(f"strategy {strategy!r} {problem}")
        if isinstance(step, Choose):
            self.chosen = step.candidate
        return step

    def add(self, samples: Sequence[Sample], rewards: Sequence[float], whole: Sequence[bool]) -> None:
        """New candidates, whole or begun, with their rewards."""
        self.candidates += samples
        self.rewards += map(float, rewards)
        self.whole += whole
        tokens = sum(len(sample.token_ids) for sample in samples)
        self.spent += Spent(len(samples), 0, tokens, len(samples), tokens)

    def refer(self, samples: Sequence[Sample], rewards: Sequence[float]) -> None:
        """New base samples, with their rewards."""
        self.references = (self.references or []) + [float(one) for one in rewards]
        tokens = sum(len(sample.token_ids) for sample in samples)
        self.spent += Spent(0, len(samples), tokens, len(samples), tokens)

    def finish(self, places: Sequence[int], samples: Sequence[Sample], rewards: Sequence[float]) -> None:
        """Begun candidates, now whole, with their rewards anew."""
        for place, sample, reward in zip(places, samples, rewards, strict=True):
            drawn = len(sample.token_ids) - len(self.candidates[place].token_ids)
            self.candidates[place], self.rewards[place], self.whole[place] = sample, float(reward), True
            self.spent += Spent(0, 0, drawn, 1, len(sample.token_ids))

    @property
    def whole_rewards(self) -> Floats:
        """(N,) rewards of whole candidates; NaN for those that were given up."""
        return np.where(np.array(self.whole, dtype=bool), np.array(self.rewards, dtype=np.float64), np.nan)

    def _problem(self, step: Step, strategy: Strategy) -> str:
        held = len(self.candidates)
        if isinstance(step, Draw):
            if step.count < 1 or (step.tokens is not None and step.tokens < 1):
                return f"asks for {step}: count and tokens must be at least 1"
            if not step.reference and held + step.count > strategy.n:
                return f"draws {held + step.count} candidates, more than its n={strategy.n}"
            if step.reference and self.references is not None:
                return "asks for reference samples twice: ask once, for all"
        elif isinstance(step, Finish):
            begun = {place for place in range(held) if not self.whole[place]}
            if not step.candidates or not set(step.candidates) <= begun:
                return f"asks to finish candidates {list(step.candidates)}, but begun are {sorted(begun)}"
        elif isinstance(step, Choose):
            if step.candidate is not None and not (0 <= step.candidate < held and self.whole[step.candidate]):
                return f"chooses candidate {step.candidate}, which is not there or not whole"
        else:
            return f"must answer Draw, Finish or Choose; got {step!r}"
        return ""


def whole(name: str, value: object, least: int) -> None:
    """Raises InputError unless `value` is a whole number of at least `least`; True and 4.0 are mistakes."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number >= {least}; got {value!r}")


def fraction(name: str, value: object) -> None:
    """Raises InputError unless `value` is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise InputError(f"{name} must be a number above 0 and at most 1; got {value!r}")
