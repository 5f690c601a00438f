"""The optimal reward transformation of an inference procedure, and the best win rate any policy reaches at a KL.

Every optimum satisfies Phi'(u) = g(u) g(Q(u)), Q the CDF of its own tilted policy: it depends on the procedure and on
beta. Best-of-N and Worst-of-N are solved exactly (`frontier`), plain sampling in closed form (the identity), and all
other procedures by Newton on the boundary-value problem (`bvp`), in logs where Q becomes tiny (`deep`).

Theory: InfAlign (arXiv:2412.19792), the coupled equations; the solvers are derived in our notes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.theory.bvp import solve_general
from infalign.theory.frontier import Solution, solve_extreme
from infalign.theory.hermite import Curve
from infalign.theory.mesh import FAINTEST
from infalign.theory.procedures import BestOfN, Procedure, WorstOfN, check_procedure
from infalign.theory.tilted import one_of, tilt
from infalign.theory.transforms import identity
from infalign.types import InputError

Floats = NDArray[np.float64]

SMALLEST_BETA, LARGEST_BETA, LARGEST_KL = 1e-8, 1e8, 20.0
LARGEST_RESIDUAL = 1e-5
_GAUSS = np.polynomial.legendre.leggauss(5)
_NODES, _WEIGHTS = (1 + _GAUSS[0]) / 2, _GAUSS[1] / 2


@dataclass(frozen=True, repr=False)
class OptimalTransform:
    """Phi* of a procedure at a beta, as a callable u -> Phi*(u) with Phi*(0) = 0.

    `beta` > 0 (0.0 when `log_beta` underflows), `kl` in nats and `win_rate` of the optimal policy;
    `residual` is the largest |Phi'(u) - g(u) g(Q(u))| relative to the largest g(u) g(Q(u)), Q integrated afresh.
    """

    procedure: Procedure
    log_beta: float
    kl: float
    win_rate: float
    residual: float
    _solution: Solution = field(compare=False)
    name: str = field(default="optimal", init=False)

    def __repr__(self) -> str:
        return f"OptimalTransform({self.procedure!r}, log_beta={self.log_beta:.6g})"

    @property
    def beta(self) -> float:
        """The KL coefficient this transformation is optimal at."""
        return math.exp(self.log_beta)

    def __call__(self, u: ArrayLike) -> Floats:
        """Phi*(u) at u in [0, 1], any shape; NaN (no score) passes through; raises InputError outside."""
        u = np.asarray(u, dtype=float)
        return np.where(np.isnan(u), np.nan, self._solution.phi(_within(np.nan_to_num(u))))[()]

    def density(self, u: ArrayLike) -> Floats:
        """q(u), the optimal policy's density at base quantiles u in [0, 1]; raises InputError outside."""
        return np.exp(self._solution.log_density(_within(u)))[()]

    def cdf(self, u: ArrayLike) -> Floats:
        """Q(u), the optimal policy's mass below base quantile u in [0, 1]; raises InputError outside."""
        return np.clip(self._solution.cdf(_within(u)), 0.0, 1.0)[()]


def optimal_transform(procedure: Procedure, beta: float | None = None, kl: float | None = None) -> OptimalTransform:
    """Phi* with Phi*'(u) = g(u) g(Q(u)), q ~ exp(Phi*/beta), at `beta` or at the beta that gives `kl` nats.

    Give exactly one. beta in [1e-8, 1e8], kl in [1e-9, 20]. Near Worst-of-N and for large N the beta of a large KL may
    underflow: `cdf` and `density` stay right, but no trainer can use such a pair. Raises InputError for both or
    neither and for values out of range.

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
    return _solved(procedure, beta, kl)


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
    limits = [_limit(procedure, float(value)) for value in kl_array.ravel()]
    return limits[0] if kl_array.ndim == 0 else np.array(limits).reshape(kl_array.shape)


def _limit(procedure: Procedure, kl: float) -> float:
    """W* at one KL."""
    return 0.5 if kl == 0 else optimal_transform(procedure, kl=kl).win_rate


@lru_cache(maxsize=512)
def _solved(procedure: Procedure, beta: float | None, kl: float | None) -> OptimalTransform:
    """Dispatch to the right solver."""
    log_beta = None if beta is None else math.log(beta)
    if procedure.monotone == "constant":
        solution = _plain(beta, kl)
    elif procedure in (BestOfN(procedure.n), WorstOfN(procedure.n)):
        solution = solve_extreme(procedure.n, procedure == WorstOfN(procedure.n), log_beta, kl)
    else:
        solution = solve_general(procedure, log_beta, kl)
    residual = _residual(procedure, solution)
    if not residual < LARGEST_RESIDUAL:
        raise InputError(f"no accurate optimum of {procedure!r} at beta={beta}, kl={kl} (residual {residual:.1e})")
    return OptimalTransform(procedure, solution.log_beta, solution.kl, solution.win_rate, residual, solution)


def _plain(beta: float | None, kl: float | None) -> Solution:
    """Plain sampling: Phi = u, in closed form."""
    policy = tilt(identity, beta, kl)
    top = np.concatenate([[0.0], policy.beta * np.geomspace(1e-2, 50, 1500)])
    top = np.append(top[top < 1 - 1e-12], 1.0) if policy.beta < 1 else np.linspace(0, 1, 1001)
    q = policy.density(1 - top)
    flat, pull = np.zeros_like(top), np.full_like(top, 1 / policy.beta)
    return Solution(
        math.log(policy.beta),
        policy.kl,
        policy.win_rate(BestOfN(1)),
        Curve(top, 1 - top, flat - 1, flat, True),
        Curve(top, (1 - top) / policy.beta - policy.log_partition, -pull, flat, True),
        Curve(top, policy.cdf(1 - top), -q, q * pull, True),
    )


def _residual(procedure: Procedure, solution: Solution) -> float:
    """max |Phi' - g(u) g(Q)| / max g(u) g(Q) at cell middles, Q integrated (in logs) from the log-density curve."""
    node = solution.phi.node
    middle = (node[1:] + node[:-1]) / 2
    places = [np.stack([node[:-1], middle], 1).ravel(), np.stack([middle, node[1:]], 1).ravel()]
    width = (places[1] - places[0])[:, None]
    at, weights = places[0][:, None] + width * _NODES, width * _WEIGHTS
    level = solution.log_density.at_place(at)
    highest = level.max(-1)
    mass = highest + np.log((np.exp(level - highest[:, None]) * weights).sum(-1))
    from_top = solution.phi.from_top
    below = np.logaddexp.accumulate(mass[::-1] if from_top else mass)
    log_cdf = (below - below[-1])[::-1][1::2] if from_top else (below - below[-1])[::2]
    u = 1 - middle if from_top else middle
    log_g = procedure.log_density(u)[0]
    if from_top and procedure.monotone == "neither":
        log_g = np.where(middle < 0.1, procedure.mirror.log_density(middle)[0], log_g)
    log_g_cdf, power = _log_g(procedure, log_cdf)
    floored = (highest[::2] <= -1e4) & (power > 0.5)  # too little is known of Q to tell g(Q)
    wanted = np.where(floored, -np.inf, log_g + log_g_cdf)
    largest = float(wanted.max())
    slope = (
        solution.phi.slope_at_place(middle) * math.exp(-largest)
        if largest > -690
        else (solution.log_density.slope_at_place(middle) * math.exp(solution.log_beta - largest))
    )
    return float(np.max(np.abs(slope * (-1 if from_top else 1) - np.exp(wanted - largest))))


def _log_g(procedure: Procedure, log_cdf: Floats) -> tuple[Floats, Floats]:
    """log g(Q) from log Q, below FAINTEST along the power of Q that g is there, and that power (0 above)."""
    log_faintest = math.log(FAINTEST)
    log_g, steep = procedure.log_density(np.exp(np.clip(log_cdf, log_faintest, 0.0)))
    power = np.where(log_cdf < log_faintest, FAINTEST * steep, 0.0)
    return log_g + power * np.minimum(log_cdf - log_faintest, 0.0), power


def _within(u: ArrayLike) -> Floats:
    """u as floats in [0, 1]."""
    u = np.asarray(u, dtype=float)
    if not np.all((u >= 0) & (u <= 1)):
        raise InputError(f"u must lie in [0, 1]; got values in [{np.min(u)}, {np.max(u)}]")
    return u
