"""Policies on a graded mesh of base quantiles: what the boundary-value solver iterates on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FAINTEST = 1e-300
"""The smallest policy mass Q that g(Q) is evaluated at."""


@dataclass(frozen=True)
class State:
    """A policy on mesh nodes: quantile u and distance 1 - u, Q, L = log q (all (Q,)) and log beta."""

    u: Floats
    top: Floats
    cdf: Floats
    log_q: Floats
    log_beta: float

    @property
    def widths(self) -> Floats:
        """Cell widths, accurate relative to themselves at both ends: (Q-1,)."""
        return np.where(self.u[1:] < 0.5, np.diff(self.u), -np.diff(self.top))


def with_beta(state: State, log_beta: float) -> State:
    """The same policy at another beta."""
    return State(state.u, state.top, state.cdf, state.log_q, log_beta)


def monotone_cubic(value: Floats, slope: Floats, cell: NDArray[np.intp], part: Floats, h: Floats) -> Floats:
    """Cubic Hermite interpolation of a monotone function at `part` of each cell, slopes limited so that it stays so."""
    left, right = value[cell], value[cell + 1]
    rise = right - left
    lowest, highest = np.minimum(3 * rise, 0.0), np.maximum(3 * rise, 0.0)
    d0, d1 = (np.clip(np.nan_to_num(slope[end]) * h, lowest, highest) for end in (cell, cell + 1))
    inner = left + part * (d0 + part * (3 * rise - 2 * d0 - d1 + part * (d0 + d1 - 2 * rise)))
    return inner
