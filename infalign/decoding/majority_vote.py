"""Majority vote on extracted answers (self-consistency)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from infalign.decoding.answers import Extractor, extractor, normal_form
from infalign.decoding.by_procedure import selected
from infalign.decoding.strategy import Choose, Draw, Seen, Step, whole
from infalign.theory.procedures import BestOfN
from infalign.types import InputError


@dataclass(frozen=True)
class MajorityVote:
    """Draw n candidates; the answer that most of them give wins (self-consistency: Wang et al., arXiv:2203.11171).

    Every candidate with an answer votes, scored or not; weighted, its vote counts its reward (as in the voting
    verifier of Li et al., arXiv:2206.02336), and one without a score has none. Equal votes: the answer whose
    candidates have the higher mean reward, else the one given first. Of the candidates that give the winning answer
    the one with the highest reward is chosen, else the first. Where no candidate has an answer (weighted: a vote), the
    best reward decides, as in Best-of-N.

    Args:
        n: candidates.
        answer: how the answer is found: marked (boxed, else after ####, else the last number), boxed, hashes, number,
            text, or a regular expression (its last match; its first group where it has one).
        weighted: votes weigh their rewards, which must not be negative.
        extract: the extractor itself, in place of the one that `answer` names.

    Raises:
        InputError: an argument that is not allowed; in `step`, a weighted vote with a negative reward.

    >>> MajorityVote(8, "boxed")
    MajorityVote(n=8, answer='boxed', weighted=False)
    """

    n: int
    answer: str = "marked"
    weighted: bool = False
    extract: Extractor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        whole("n", self.n, 1)
        if not isinstance(self.weighted, bool):
            raise InputError(f"weighted must be true or false; got {self.weighted!r}")
        if self.extract is None:
            object.__setattr__(self, "extract", extractor(self.answer))

    @property
    def width(self) -> int:
        """All candidates are drawn at once."""
        return self.n

    def step(self, seen: Seen) -> Step:
        """Draw all, count the votes, choose."""
        if not seen.candidates:
            return Draw(self.n)
        assert self.extract is not None
        voters: dict[str, list[int]] = {}  # by answer, the places that give it
        for place, sample in enumerate(seen.candidates):
            answer = self.extract(sample.text)
            if answer is not None and not (self.weighted and np.isnan(seen.rewards_N[place])):
                voters.setdefault(normal_form(str(answer)), []).append(place)
        if not voters:
            return Choose(selected(BestOfN(self.n), seen.rewards_N, seen.rng))
        winner = max(voters.values(), key=lambda places: self._standing(seen.rewards_N[places], places[0]))
        best = np.where(np.isnan(seen.rewards_N[winner]), -np.inf, seen.rewards_N[winner])
        return Choose(winner[int(best.argmax())])

    def _standing(self, rewards: NDArray[np.float64], first: int) -> tuple[float, float, int]:
        """What answers are ordered by: votes, mean reward, the earlier first."""
        scored = rewards[~np.isnan(rewards)]
        if self.weighted and (scored < 0).any():
            raise InputError(
                f"a weighted majority vote needs rewards >= 0 (e.g. chances of being right); got {scored.min():g}: "
                "map the reward, or set weighted: false"
            )
        votes = float(scored.sum()) if self.weighted else float(rewards.size)
        return votes, float(scored.mean()) if scored.size else -np.inf, -first
