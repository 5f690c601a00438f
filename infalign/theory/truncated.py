"""The policy that is uniform above a base quantile: what rejection below a threshold gives, and the aim of TUP.

Of all policies with its KL it is the least sure about what stands at the top, and so the least hurt where the reward is
wrong there; for a reward that is right it is far from the limit (Best-of-4 at one nat: .754, the limit is .941).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.theory.procedures import Procedure
from infalign.theory.tilted import quantiles, win_rate_of
from infalign.types import InputError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class UniformAbove:
    """The policy with density 1/(1 - threshold) above `threshold` and 0 below, in base quantiles.

    Called, it is its own reward: 1 above the threshold and 0 below. Raises InputError unless 0 < threshold < 1.

    >>> round(UniformAbove(0.75).kl, 4)  # log 4
    1.3863
    """

    threshold: float
    name: str = field(default="uniform_above", init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise InputError(f"threshold must be a quantile in (0, 1), got {self.threshold!r}")

    @property
    def kl(self) -> float:
        """Nats: -log(1 - threshold)."""
        return -math.log1p(-self.threshold)

    def __call__(self, u: ArrayLike) -> Floats:
        """1 above the threshold, else 0; u in [0, 1], any shape."""
        return (quantiles(u) > self.threshold).astype(np.float64)

    def density(self, u: ArrayLike) -> Floats:
        """q(u)."""
        return self(u) / (1.0 - self.threshold)

    def cdf(self, u: ArrayLike) -> Floats:
        """Q(u)."""
        return np.clip((quantiles(u) - self.threshold) / (1.0 - self.threshold), 0.0, 1.0)

    def win_rate(self, procedure: Procedure) -> float:
        """W against the base policy, both decoded by `procedure`."""
        return win_rate_of(self.cdf, procedure)
