"""Best-of-N with an N that follows the prompt: stop when one more sample is not worth its cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import special

from infalign.decoding.by_procedure import selected
from infalign.decoding.strategy import Choose, Draw, Seen, Step, whole
from infalign.theory.procedures import BestOfN
from infalign.types import InputError


@dataclass(frozen=True)
class Adaptive:
    """Draw between `n_min` and `n` candidates, stop when the next one's expected gain is below `cost`, keep the best.

    The gain of one more candidate X over the best reward seen, b, is `E max(X - b, 0)`. With a known reward
    distribution, stopping as soon as that is below the cost of a draw is the optimal rule (search with recall:
    Weitzman 1979, "Optimal search for the best alternative"). The distribution is not known: X follows what a normal
    model with unknown mean and variance predicts from the m rewards seen, Student's t with m - 1 degrees of freedom
    (`expected_gain`), whose wide tails keep a handful of alike rewards from ending the search too early. The rule
    looks one candidate ahead and takes rewards for normal: a heuristic, whose win rate and cost are measured.

    Args:
        n: most candidates.
        cost: of one candidate, at least 0, in `unit`: 0 never stops before n.
        n_min: fewest candidates, at least 3 (the predicted gain is infinite before).
        unit: "reward": cost is in the reward's own unit; "spread": in standard deviations of the rewards seen, so that
            it means the same for every reward and prompt.
        at_once: candidates drawn in one step after the first n_min.

    Raises:
        InputError: an argument out of its range.

    >>> Adaptive(16, cost=0.1)
    Adaptive(n=16, cost=0.1, n_min=3, unit='reward', at_once=1)
    """

    n: int
    cost: float
    n_min: int = 3
    unit: Literal["reward", "spread"] = "reward"
    at_once: int = 1

    def __post_init__(self) -> None:
        whole("n_min", self.n_min, 3)
        whole("n", self.n, self.n_min)
        whole("at_once", self.at_once, 1)
        if isinstance(self.cost, bool) or not isinstance(self.cost, int | float) or not 0 <= self.cost < np.inf:
            raise InputError(f"cost must be a finite number >= 0; got {self.cost!r}")
        if self.unit not in ("reward", "spread"):
            raise InputError(f"unit must be reward or spread; got {self.unit!r}")

    @property
    def width(self) -> int:
        """The first `n_min` are drawn at once."""
        return max(self.n_min, min(self.at_once, self.n))

    def step(self, seen: Seen) -> Step:
        """Draw on while it pays."""
        drawn = len(seen.candidates)
        if not drawn:
            return Draw(self.n_min)
        scored_M = seen.rewards_N[~np.isnan(seen.rewards_N)]
        pays = drawn < self.n
        if pays and scored_M.size >= 3:  # with fewer the predicted gain is infinite
            spread = float(scored_M.std(ddof=1)) if self.unit == "spread" else 1.0
            pays = expected_gain(scored_M) >= self.cost * spread
        if pays:
            return Draw(min(self.at_once, self.n - drawn))
        return Choose(selected(BestOfN(drawn), seen.rewards_N, seen.rng))


def expected_gain(rewards_M: NDArray[np.float64]) -> float:
    """E max(X - max r, 0) of one more reward X, predicted by a normal model of unknown mean and variance.

    X = mean + s T with s = sd sqrt(1 + 1/m) and T Student's t with v = m - 1 degrees of freedom (the predictive
    distribution under the prior 1/variance). With z = (max r - mean)/s, F and f its distribution and density:
    `s [(v + z^2)/(v - 1) f(z) - z (1 - F(z))]`. 0 when all rewards are equal.

    Args:
        rewards_M: at least 3 finite rewards.

    >>> round(expected_gain(np.array([0.0, 1.0, 2.0])), 4)
    0.4574
    """
    m = rewards_M.size
    scale = float(rewards_M.std(ddof=1)) * np.sqrt(1 + 1 / m)
    if scale == 0.0:
        return 0.0
    freedom = m - 1
    z = float(rewards_M.max() - rewards_M.mean()) / scale
    # Student's density by logarithms, because Gamma overflows from about 340 degrees of freedom on
    log_constant = special.gammaln((freedom + 1) / 2) - special.gammaln(freedom / 2) - 0.5 * np.log(freedom * np.pi)
    density = np.exp(log_constant - (freedom + 1) / 2 * np.log1p(z**2 / freedom))
    above = special.stdtr(freedom, -z)  # 1 - F(z) by symmetry, without its cancellation
    return float(scale * max((freedom + z**2) / (freedom - 1) * density - z * above, 0.0))
