"""The optimal reward transformation of an inference procedure, and the best win rate any policy reaches at a KL.

Every optimum satisfies Phi'(u) = g(u) g(Q(u)), Q the CDF of its own tilted policy (README.md, equation 5): it depends
on the procedure and on beta. `levels` finds Q; here it becomes curves.

Theory: InfAlign (arXiv:2412.19792), the coupled equations; the derivation is in infalign/theory/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import cumulative_simpson
from scipy.interpolate import CubicHermiteSpline

from infalign.theory.levels import ContinuousPolicy, continuous_optimum
from infalign.theory.procedures import Procedure, check_procedure
from infalign.theory.tilted import one_of, quantiles, win_rate_of
from infalign.types import InputError

Floats = NDArray[np.float64]

SMALLEST_BETA, LARGEST_BETA, LARGEST_KL = 1e-8, 1e8, 20.0


class LimitWinRate(float):
    """W* of an optimum: a number, and when called with another procedure, what the same policy wins under that one."""

    optimum: OptimalTransform

    def __call__(self, procedure: Procedure) -> float:
        """W of the policy against the base, both decoded by `procedure`."""
        if procedure == self.optimum.procedure:
            return float(self)
        return win_rate_of(self.optimum.cdf, procedure)


@dataclass(frozen=True, repr=False)
class OptimalTransform:
    """Phi* of a procedure at a beta, as a callable u -> Phi*(u) with Phi*(0) = 0.

    `beta` > 0; `kl` in nats and `win_rate` of the optimal policy; `residual` is the largest
    |Phi'(u) - g(u) g(Q(u))| relative to the largest g(u) g(Q(u)), Q integrated afresh.
    """

    procedure: Procedure
    log_beta: float
    kl: float
    _win_rate: float
    _solution: ContinuousPolicy = field(compare=False)
    name: str = field(default="optimal", init=False)

    def __repr__(self) -> str:
        return (
            f"OptimalTransform({self.procedure!r}, kl={self.kl:.6g}, beta={self.beta:.6g}, "
            f"win_rate={self.win_rate:.6f})"
        )

    @property
    def label(self) -> str:
        """What tells it from others, the same text in every run and version."""
        return f"OptimalTransform({self.procedure!r}, log_beta={self.log_beta:.6g})"

    @property
    def beta(self) -> float:
        """The KL coefficient this transformation is optimal at."""
        return math.exp(self.log_beta)

    @property
    def win_rate(self) -> LimitWinRate:
        """W* under the transformation's own procedure; `win_rate(procedure)` under another one.

        >>> from infalign.theory.procedures import BestOfN
        >>> best = optimal_transform(BestOfN(4), kl=1.0)
        >>> round(best.win_rate, 6), round(best.win_rate(BestOfN(2)), 6)
        (0.941123, 0.875864)
        """
        found = LimitWinRate(self._win_rate)
        found.optimum = self
        return found

    @property
    def residual(self) -> float:
        """The largest |Phi' - g(u) g(Q)| / max g(u) g(Q), with Q integrated from the density of Phi."""
        return self._curves.residual

    def __call__(self, u: ArrayLike) -> Floats:
        """Phi*(u) at u in [0, 1], any shape; NaN (no score) passes through; raises InputError outside."""
        u = np.asarray(u, dtype=float)
        # NaN is 0 for the range check and the spline, and NaN again in the result
        below_one = self._curves.phi(1 - quantiles(np.nan_to_num(u)))
        return np.where(np.isnan(u), np.nan, below_one - self._curves.lowest)[()]

    def density(self, u: ArrayLike) -> Floats:
        """q(u), the optimal policy's density at base quantiles u in [0, 1]; raises InputError outside."""
        return np.exp(self._curves.phi(1 - quantiles(u)) / self.beta - self._curves.log_partition)[()]

    def cdf(self, u: ArrayLike) -> Floats:
        """Q(u), the optimal policy's mass below base quantile u in [0, 1]; raises InputError outside."""
        return np.clip(self._curves.cdf(1 - quantiles(u)), 0.0, 1.0)[()]

    @cached_property
    def _curves(self) -> _Curves:
        return _curves(self.procedure, self._solution)


@dataclass(frozen=True)
class _Curves:
    """Splines in 1 - u, which stays resolved where all mass is near u = 1: `phi` is Phi - Phi(1), `cdf` is Q.

    `lowest` is Phi(0) - Phi(1), `log_partition` log int exp((Phi - Phi(1))/beta).
    """

    phi: CubicHermiteSpline
    cdf: CubicHermiteSpline
    lowest: float
    log_partition: float
    residual: float


def _curves(procedure: Procedure, found: ContinuousPolicy) -> _Curves:
    """Phi by integrating g(u) g(Q) from the top down, q from Phi, and splines through both."""
    g_u = _on_both_ends(procedure, found.below, found.above)
    slope = g_u * _on_both_ends(procedure, found.cdf, found.survival)
    # From here on everything runs in v = 1 - u, ascending: from the top level down.
    above = found.above[::-1]
    # splines need distinct places; edges closer than a rounding are the same place
    kept = np.append(True, np.diff(above) > 0)
    above, slope, cdf, g_u = above[kept], slope[::-1][kept], found.cdf[::-1][kept], g_u[::-1][kept]
    # Phi - Phi(1) = -int_0^v g g(Q). It can't rise with v, which Simpson's parabolas may do by a rounding.
    phi = np.minimum.accumulate(-cumulative_simpson(slope, x=above, initial=0))
    tilt = np.exp(phi / math.exp(found.log_beta))
    # the policy's mass above each place, up to Z, which is the last of them
    mass = cumulative_simpson(tilt, x=above, initial=0)
    afresh = np.clip(1 - mass / mass[-1], 0.0, 1.0)
    residual = np.abs(slope - g_u * procedure.density(afresh)).max() / slope.max()
    return _Curves(
        # derivatives are with respect to v, hence the signs
        CubicHermiteSpline(above, phi, -slope),
        CubicHermiteSpline(above, cdf, -tilt / mass[-1]),
        float(phi[-1]),
        math.log(mass[-1]),
        float(residual),
    )


def _on_both_ends(procedure: Procedure, p: Floats, rest: Floats) -> Floats:
    """g at probabilities p, from `rest` = 1 - p where that is the smaller: accurate relative to itself."""
    return np.where(p < 0.5, procedure.density(np.clip(p, 0, 1)), procedure.mirror.density(np.clip(rest, 0, 1)))


def optimal_transform(procedure: Procedure, beta: float | None = None, kl: float | None = None) -> OptimalTransform:
    """Phi* with Phi*'(u) = g(u) g(Q(u)), q ~ exp(Phi*/beta), at `beta` or at the beta that gives `kl` nats.

    Give exactly one. beta in [1e-8, 1e8], kl in [1e-9, 20]. Raises InputError for both or neither, for values out of
    range, and for a KL whose beta is below 1e-8 (near Worst-of-N and for large N beta falls fast with the KL).

    >>> from infalign.theory.procedures import BestOfN
    >>> best = optimal_transform(BestOfN(4), kl=1.0)
    >>> round(best.win_rate, 6), round(1 / best.beta, 5)
    (0.941123, 12.04099)
    """
    check_procedure(procedure)
    beta, kl = one_of(beta, kl)
    if beta is not None and not SMALLEST_BETA <= beta <= LARGEST_BETA:
        raise InputError(f"beta must lie in [{SMALLEST_BETA:g}, {LARGEST_BETA:g}]; got {beta!r}")
    if kl is not None and kl > LARGEST_KL:
        raise InputError(f"kl must be at most {LARGEST_KL:g} nats for an optimal transform; got {kl!r}")
    solution = _solved(procedure, None if beta is None else math.log(beta), kl)
    if kl is not None and solution.log_beta < math.log(SMALLEST_BETA):
        raise InputError(
            f"{procedure!r} reaches {kl:g} nats at a beta below {SMALLEST_BETA:g}, which no training can use: lower kl"
        )
    return OptimalTransform(procedure, solution.log_beta, solution.kl, solution.win_rate, solution)


@overload
def win_rate_limit(procedure: Procedure, kl: float) -> float: ...
@overload
def win_rate_limit(procedure: Procedure, kl: Sequence[float] | Floats) -> Floats: ...
def win_rate_limit(procedure: Procedure, kl: ArrayLike) -> float | Floats:
    """W*(KL): the best win rate of any method at a KL in nats, for a reward without ties; 1/2 at KL = 0.

    kl: a number or an array of numbers in {0} or [1e-9, 20]; returns the same shape. Raises InputError outside.

    >>> from infalign.theory.procedures import BestOfN
    >>> win_rate_limit(BestOfN(4), [0.0, 1.0]).round(6).tolist()
    [0.5, 0.941123]
    """
    kl_array = np.asarray(kl, dtype=float)
    limits: list[float] = []
    for value in map(float, kl_array.ravel()):
        if value == 0:
            limits.append(0.5)
            continue
        _, checked = one_of(None, value)
        if value > LARGEST_KL:
            raise InputError(f"kl must be at most {LARGEST_KL:g} nats; got {value!r}")
        limits.append(_solved(check_procedure(procedure), None, checked).win_rate)
    return limits[0] if kl_array.ndim == 0 else np.array(limits).reshape(kl_array.shape)


@lru_cache(maxsize=512)
def _solved(procedure: Procedure, log_beta: float | None, kl: float | None) -> ContinuousPolicy:
    return continuous_optimum(procedure, log_beta, kl)
