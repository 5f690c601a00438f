"""How far from the best possible: KL with its error, the exact limit at that KL, attainment and regret.

For a continuous reward no method whatever exceeds `win_rate_limit(procedure, kl)`; where rewards tie, the limit over
the tie blocks is lower and printed beside it (theory.md sections 3 and 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from infalign.theory.tilted import tied_optimum

if TYPE_CHECKING:
    from infalign.theory.procedures import Procedure

Array = NDArray[np.float64]

_FINE = 4  # a reward value seen once stands for a continuous stretch: split in so many levels
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


def attainment(win_rate: float, limit: float, kl: float) -> float:
    """`(W - 1/2) / (W* - 1/2)`: 1 is the limit of any method at this KL. NaN where KL is too small to tell.

    >>> round(attainment(0.9, 0.94, 1.0), 3)
    0.909
    """
    return (win_rate - 0.5) / (limit - 0.5) if kl > _TOO_SMALL else float("nan")


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

    All prompts share one beta (where dW/dKL is equal, no KL is better spent elsewhere), found such that the mean KL is
    `kl`; where even beta -> 0 needs less than `kl`, that supremum.
    """
    if kl <= 0.0:
        return 0.5
    masses = [level_masses(row) for row in base_rewards_PM]

    def at(log_beta: float) -> tuple[float, float]:
        found = [tied_optimum(procedure, row, beta=float(np.exp(log_beta))) for row in masses]
        return float(np.mean([one.kl for one in found])), float(np.mean([one.win_rate for one in found]))

    low, high = np.log(1e-3), np.log(1e2)
    if at(low)[0] <= kl:
        return at(low)[1]
    if at(high)[0] >= kl:
        return 0.5
    return at(brentq(lambda value: at(value)[0] - kl, low, high, xtol=1e-3))[1]
