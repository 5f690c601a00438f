"""Which N to deploy when another reward judges: gold wins of Best-of-N against N, and where more candidates hurt.

The opponent stays the same for every N: the base as the recipe's procedure decodes it. A sample's gold wins over it are
known without bias (the procedure's order weights of the base's samples, by the proxy), and so is Best-of-N of them for
every N up to the number of samples. Intervals are over prompts, of all N from the same resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infalign.evaluation.length import Side
from infalign.evaluation.winrate import tied_weights
from infalign.theory.procedures import BestOfN, Procedure
from infalign.types import InputError

Floats = NDArray[np.float64]

RESAMPLES = 2000


@dataclass(frozen=True)
class GoldCurve:
    """Gold win rates of Best-of-N of one model's samples against the decoded base.

    Attributes:
        n: the N that were looked at, ascending.
        mean, low, high: win rates with their intervals, one for each N.
        best: the N that wins most, between `best_low` and `best_high` with the asked confidence.
        hurts_from: the smallest N above `best` that wins less than it does, by more than chance; 0 where none does.
    """

    n: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    best: int
    best_low: int
    best_high: int
    hurts_from: int

    def __str__(self) -> str:
        at = self.n.index(self.best)
        text = f"deploy Best-of-{self.best}"
        if self.best_low != self.best_high:
            text += f" (between {self.best_low} and {self.best_high})"
        text += f": it wins {100 * self.mean[at]:.1f} % [{100 * self.low[at]:.1f}, {100 * self.high[at]:.1f}]"
        if self.hurts_from:
            return f"{text}; from N = {self.hurts_from} on, more candidates hurt"
        return f"{text}; more candidates do not hurt up to N = {self.n[-1]}"


@dataclass(frozen=True)
class Deployment:
    """What to deploy under a judge that does not decode; `opponent` is the procedure of the base that all play."""

    opponent: str
    base: GoldCurve
    policy: GoldCurve


def sizes_up_to(most: int) -> tuple[int, ...]:
    """The N that are looked at: all up to 4, then two an octave, up to `most`.

    >>> sizes_up_to(20)
    (1, 2, 3, 4, 6, 8, 12, 16)
    """
    found = [1, 2, 3, *(step for power in range(2, 20) for step in (2**power, 3 * 2 ** (power - 1)))]
    return tuple(one for one in sorted(set(found)) if one <= most)


def deployment(
    policy: Side, base: Side, procedure: Procedure, confidence: float = 0.95, seed: int = 0
) -> Deployment | None:
    """Gold wins of both models against N; None where there are too few samples to compare N.

    Args:
        policy, base: P prompts each: rewards that decode and that judge.
        procedure: decodes the opponent.
        confidence: of the intervals.
        seed: of the bootstrap.

    Raises:
        InputError: another number of prompts.
    """
    if len(policy.proxy) != len(base.proxy):
        raise InputError(f"policy and base must have the same prompts, got {len(policy.proxy)} and {len(base.proxy)}")
    sides = [_scored(side) for side in (policy, base)]
    most = min(proxy.size for side in sides for proxy, _ in side)
    # Half of the samples: near all of them Best-of-N is the one best sample of a prompt, and says nothing of N.
    sizes = sizes_up_to(most // 2)
    if len(sizes) < 2 or most < procedure.n:
        return None
    opponents = [(judge, tied_weights(proxy, procedure)) for proxy, judge in sides[1]]
    curves = [_curve(side, opponents, sizes, confidence, seed) for side in sides]
    return Deployment(repr(procedure), base=curves[1], policy=curves[0])


def _scored(side: Side) -> list[tuple[Floats, Floats]]:
    """Each prompt's samples that both rewards scored."""
    pairs = [np.asarray([proxy, judge], dtype=np.float64) for proxy, judge in zip(side.proxy, side.judge, strict=True)]
    kept = [pair[:, ~np.isnan(pair).any(0)] for pair in pairs]
    return [(pair[0], pair[1]) for pair in kept]


def _curve(
    side: Sequence[tuple[Floats, Floats]],
    opponents: Sequence[tuple[Floats, Floats]],
    sizes: tuple[int, ...],
    confidence: float,
    seed: int,
) -> GoldCurve:
    wins_PN = np.empty((len(side), len(sizes)))
    for number, ((proxy_M, judge_M), (their_judge_M, weights_M)) in enumerate(zip(side, opponents, strict=True)):
        above_MM = (judge_M[:, None] > their_judge_M) + 0.5 * (judge_M[:, None] == their_judge_M)
        beats_M = above_MM @ weights_M
        wins_PN[number] = [tied_weights(proxy_M, BestOfN(n)) @ beats_M for n in sizes]
    mean_N = wins_PN.mean(0)
    best = int(mean_N.argmax())
    shares_RP = np.random.default_rng(seed).multinomial(len(side), np.full(len(side), 1 / len(side)), size=RESAMPLES)
    means_RN = shares_RP @ wins_PN / len(side)
    tail = (1.0 - confidence) / 2.0
    low_N, high_N = np.quantile(means_RN, [tail, 1.0 - tail], axis=0)
    chosen_R = np.array(sizes)[means_RN.argmax(1)]
    first, last = np.quantile(chosen_R, [tail, 1.0 - tail], method="nearest").astype(int).tolist()
    # of several N that are compared with the best one, each at its own confidence
    lost_N = np.quantile(means_RN[:, [best]] - means_RN, tail, axis=0) > 0.0
    worse = [n for n, lost in zip(sizes, lost_N, strict=True) if lost and n > sizes[best]]
    return GoldCurve(
        n=sizes,
        mean=tuple(mean_N.tolist()),
        low=tuple(low_N.tolist()),
        high=tuple(high_N.tolist()),
        best=sizes[best],
        best_low=first,
        best_high=last,
        hurts_from=worse[0] if worse else 0,
    )
