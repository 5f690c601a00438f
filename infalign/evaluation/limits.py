"""How far from the best possible: KL with its error, the exact limit at that KL, attainment and regret.

For a continuous reward no method whatever exceeds `win_rate_limit(procedure, kl)`; where rewards tie, the limit over
the tie blocks is lower and printed beside it (infalign/theory/README.md, equations 7 and 13).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from infalign.theory.levels import SMALLEST_KL, tied_limit
from infalign.theory.optimum import win_rate_limit

if TYPE_CHECKING:
    from infalign.theory.procedures import Procedure

Array = NDArray[np.float64]

_FINE = 4  # a reward value seen once stands for a continuous stretch: split in so many levels
_KNOTS = 8  # budgets at which a prompt's tie frontier is solved: powers of 2 around the measured KL
_MOST_PROMPTS = 256  # for the tie limit, an average; more are thinned out evenly
_MOST_KL = 20.0  # nats: beyond, nothing is left to gain
_TOO_SMALL = 0.02  # nats: below, attainment divides noise by noise


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts with its standard error."""

    mean: float
    error: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


def cluster_mean(values_PM: Sequence[Array]) -> Estimate:
    """Mean and standard error of samples clustered by prompt: the error is over prompts' means."""
    means = np.array([row.mean() for row in values_PM])
    error = float(means.std(ddof=1) / np.sqrt(means.size)) if means.size > 1 else float("nan")
    return Estimate(float(means.mean()), error)


def limit_at(procedure: Procedure, kl: float) -> float:
    """`win_rate_limit` at a measured KL, which may be negative, next to nothing, or larger than any budget.

    >>> from infalign.theory.procedures import BestOfN
    >>> [round(limit_at(BestOfN(4), kl), 4) for kl in (-0.01, 1e-10, 1.0, 30.0)]
    [0.5, 0.5, 0.9411, 1.0]
    """
    return 0.5 if kl < SMALLEST_KL else float(win_rate_limit(procedure, min(kl, _MOST_KL)))


def attainment(win_rate: float, limit: float, kl: float) -> float:
    """`(W - 1/2) / (W* - 1/2)`: 1 is the limit of any method at this KL. NaN where KL is too small to tell.

    >>> round(attainment(0.9, 0.94, 1.0), 3)
    0.909
    """
    # the limit is 1/2 where a reward never differs
    return (win_rate - 0.5) / (limit - 0.5) if kl > _TOO_SMALL and limit > 0.5 else float("nan")


def regret_ratio(win_rate: float, limit: float) -> float:
    """`(1 - W) / (1 - W*)`: for Worst-of-N, where win rates saturate at 1 and attainment says little. 1 is perfect."""
    return (1.0 - win_rate) / (1.0 - limit) if limit < 1.0 else float("nan")


def level_masses(base_rewards_M: Array) -> Array:
    """(J,) base masses of a prompt's reward levels, estimated from samples.

    Values seen once are taken as draws from a continuous stretch (split into fine levels); repeated ones are ties.
    """
    values = base_rewards_M[~np.isnan(base_rewards_M)]
    counts = np.unique(values, return_counts=True)[1]
    pieces = [np.full(_FINE, 1.0 / _FINE) if count == 1 else np.array([float(count)]) for count in counts]
    return np.concatenate(pieces) / values.size


def tie_limit(procedure: Procedure, base_rewards_PM: Sequence[Array], kl: float) -> float:
    """The highest mean win rate that ties allow at mean KL `kl`.

    KL is spent where it buys most: all prompts share one slope dW/dKL (the beta of the optimum). Each prompt's frontier
    is solved at `_KNOTS` budgets and interpolated.
    """
    if kl < SMALLEST_KL:
        return 0.5
    top = max(kl, min(8.0 * kl, _MOST_KL))
    # prompts with ties near the top spend little, others more: from kl / 16, where that is solvable, to 8 kl
    budgets_Q = np.concatenate([[0.0], np.geomspace(max(kl / 16, SMALLEST_KL), top, _KNOTS)])
    fine = np.unique(np.concatenate([[0.0, kl], np.geomspace(kl / 100, top, 400)]))
    # every k-th prompt, k the quotient rounded up
    rows = list(base_rewards_PM)[:: -(-len(base_rewards_PM) // _MOST_PROMPTS)]
    frontiers: dict[bytes, Array] = {}
    for masses_J in map(level_masses, rows):
        if masses_J.tobytes() not in frontiers:
            solved = [0.5 if budget == 0.0 else tied_limit(procedure, masses_J, float(budget)) for budget in budgets_Q]
            # W - 1/2 starts like sqrt(KL), so it is nearly straight over sqrt(KL); where all mass is on top, a solved
            # value may lie a rounding below the one before it
            frontier = PchipInterpolator(np.sqrt(budgets_Q), np.maximum.accumulate(solved))
            frontiers[masses_J.tobytes()] = frontier(np.sqrt(fine))
    # (P, len(fine)); prompts with the same tie blocks (most of a binary reward's) were solved once
    win_PQ = np.array([frontiers[level_masses(row).tobytes()] for row in rows])

    def spent(log_slope: float) -> tuple[float, float]:
        # at one slope for all, each prompt buys KL for as long as a nat brings more than the slope
        best = np.argmax(win_PQ - np.exp(log_slope) * fine, axis=1)
        return float(fine[best].mean()), float(np.take_along_axis(win_PQ, best[:, None], 1).mean())

    # the KL spent falls with the slope: bisect for the slope at which the mean is kl
    low, high = np.log(1e-6), np.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2.0
        low, high = (middle, high) if spent(middle)[0] > kl else (low, middle)
    # KL is spent in steps of the grid: mix the two neighbours so that the mean is kl exactly
    (kl_above, win_above), (kl_below, win_below) = spent(low), spent(high)
    share = (kl - kl_below) / (kl_above - kl_below) if kl_above > kl_below else 0.0
    return win_below + float(np.clip(share, 0.0, 1.0)) * (win_above - win_below)
