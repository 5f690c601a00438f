"""The optimum where one reward decodes and another one judges: the proxy picks, gold counts the wins.

Let h(u) be the chance that a sample at base quantile u of the proxy beats the base's decoded sample under the gold
reward, ties half. The decoded policy lies at u with density g(Q(u)) q(u), so that (README.md, equations 16 and 17)

    W_gold = int h(u) g(Q(u)) q(u) du = h(1) - int h'(u) G(Q(u)) du,

and every optimum of W_gold - beta KL satisfies Phi'(u) = h'(u) g(Q(u)). With gold = proxy, h = G: the ordinary optimum.
Without a procedure (n = 1) Phi = h. A constant h, a proxy that tells nothing of gold, trains nothing. Where h falls, as
at a top that is hacked, Phi falls; W_gold is not concave there, and the best of several starts is kept.

h is known on levels (`calibration.judged.estimate_h` estimates it from samples that both rewards have scored), and the
solver is that of `levels`. Ours, derived from the definitions of InfAlign (arXiv:2412.19792).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.theory.levels import judged_optimum
from infalign.theory.optimum import LARGEST_BETA, LARGEST_KL, SMALLEST_BETA
from infalign.theory.procedures import Procedure, check_procedure
from infalign.theory.tilted import one_of, quantiles, win_rate_of
from infalign.types import InputError

Floats = NDArray[np.float64]


class GoldWinRate(float):
    """The gold W of an optimum: a number, and when called with a procedure, the policy's when decoded by that one.

    The opponent stays the one that h is about.
    """

    optimum: JudgedTransform

    def __call__(self, procedure: Procedure) -> float:
        """Gold W of the policy decoded by `procedure`."""
        return gold_win_rate(procedure, self.optimum.h_J, self.optimum.policy_masses_J)


@dataclass(frozen=True, repr=False)
class JudgedTransform:
    """Phi of `gold_optimal`, a callable u -> Phi(u), and the policy that it makes.

    `h_J`, `base_masses_J`, `policy_masses_J` and `phi_J` (J,) are on the levels that have base mass, ascending in the
    proxy; phi_J[0] = 0. `beta` > 0; `kl` in nats. `digest` tells one h and its levels from another.
    """

    procedure: Procedure
    beta: float
    kl: float
    digest: str
    _win_rate: float
    h_J: Floats = field(compare=False)
    base_masses_J: Floats = field(compare=False)
    policy_masses_J: Floats = field(compare=False)
    phi_J: Floats = field(compare=False)
    name: str = field(default="gold_optimal", init=False)

    def __repr__(self) -> str:
        return (
            f"JudgedTransform({self.procedure!r}, kl={self.kl:.6g}, beta={self.beta:.6g}, "
            f"win_rate={float(self.win_rate):.6f})"
        )

    @property
    def label(self) -> str:
        """What tells it from others, the same text in every run; its beta is told apart from it."""
        return f"JudgedTransform({self.procedure!r}, h={self.digest})"

    @property
    def win_rate(self) -> GoldWinRate:
        """The gold W against the base's decoded sample; `win_rate(procedure)` decodes the policy by another one."""
        found = GoldWinRate(self._win_rate)
        found.optimum = self
        return found

    def proxy_win_rate(self, procedure: Procedure | None = None) -> float:
        """W under the proxy itself, without ties, both sides decoded by `procedure` (None: its own)."""
        return win_rate_of(self.cdf, self.procedure if procedure is None else procedure)

    @property
    def residual(self) -> float:
        """The largest |log p - log(b e^{Phi/beta}/Z)| over levels with policy mass above e^-40 of the base's."""
        exponent_J = (self.phi_J - self.phi_J.max()) / self.beta
        afresh_J = exponent_J - math.log(float(self.base_masses_J @ np.exp(exponent_J)))
        seen_J = self.policy_masses_J > math.exp(-40) * self.base_masses_J
        with np.errstate(divide="ignore"):
            log_ratio_J = np.log(self.policy_masses_J / self.base_masses_J)
        return float(np.abs(log_ratio_J - afresh_J)[seen_J].max())

    def __call__(self, u: ArrayLike) -> Floats:
        """Phi at u in [0, 1], any shape: phi_J at the levels' mid-quantiles (rewards that tie have no other), linear
        between them and on to both ends.

        NaN (no score) passes through. Raises InputError outside.
        """
        u = np.asarray(u, dtype=float)
        edges = self._edges(self.base_masses_J)
        middle, phi = (edges[1:] + edges[:-1]) / 2, self.phi_J
        if len(phi) > 1:
            low, high = (phi[1] - phi[0]) / (middle[1] - middle[0]), (phi[-1] - phi[-2]) / (middle[-1] - middle[-2])
            middle = np.concatenate([[0.0], middle, [1.0]])
            phi = np.concatenate([[phi[0] - low * middle[1]], phi, [phi[-1] + high * (1 - middle[-2])]])
        value = np.interp(quantiles(np.nan_to_num(u)), middle, phi)
        return np.where(np.isnan(u), np.nan, value)[()]

    def density(self, u: ArrayLike) -> Floats:
        """q(u), the policy's density at base quantiles u in [0, 1], even on each level; raises InputError outside."""
        level = np.searchsorted(self._edges(self.base_masses_J)[1:-1], quantiles(u), side="right")
        return (self.policy_masses_J / self.base_masses_J)[level][()]

    def cdf(self, u: ArrayLike) -> Floats:
        """Q(u), the policy's mass below base quantile u in [0, 1]; raises InputError outside."""
        return np.interp(quantiles(u), self._edges(self.base_masses_J), self._edges(self.policy_masses_J))[()]

    @staticmethod
    def _edges(masses_J: Floats) -> Floats:
        """0, the cumulative masses, 1: (J+1,)."""
        edges = np.minimum(np.concatenate([[0.0], np.cumsum(masses_J)]), 1.0)
        edges[-1] = 1.0
        return edges


def gold_optimal(
    procedure: Procedure,
    h_J: ArrayLike,
    base_masses_J: ArrayLike | None = None,
    beta: float | None = None,
    kl: float | None = None,
    *,
    starts: int = 8,
) -> JudgedTransform:
    """Phi with Phi'(u) = h'(u) g(Q(u)): the best policy under a gold reward when a proxy decodes; give beta or kl.

    Args:
        procedure: decodes both sides by the proxy.
        h_J: (J,) in [0, 1], ascending in the proxy: the chance that a sample of level j beats the base's decoded
            sample under gold, ties half.
        base_masses_J: (J,) base masses of the levels; None: all the same. For a reward without ties, levels err by
            about c/J^2, at 1 nat and Best-of-4 by .001 of W with 200 even ones and 1e-5 with 2,000.
        beta, kl: in [1e-8, 1e8], or nats in [1e-9, 20]; exactly one.
        starts: where h falls, how many of its local maxima are tried as starts beside four others.

    Raises:
        InputError: both or neither of beta and kl, values out of range, masses that are none, a constant h with kl
            (no policy is better than another), or a kl above that of all mass where h is highest.

    >>> from infalign.theory.procedures import BestOfN
    >>> u = (np.arange(2000) + 0.5) / 2000
    >>> round(float(gold_optimal(BestOfN(4), 0.5 + 0.6 * (u - 0.8), kl=1.0).win_rate), 5)
    0.60956
    """
    check_procedure(procedure)
    beta, kl = one_of(beta, kl)
    h, base = _judged_levels(h_J, base_masses_J)
    if beta is not None and not SMALLEST_BETA <= beta <= LARGEST_BETA:
        raise InputError(f"beta must lie in [{SMALLEST_BETA:g}, {LARGEST_BETA:g}]; got {beta!r}")
    if kl is not None and kl > LARGEST_KL:
        raise InputError(f"kl must be at most {LARGEST_KL:g} nats; got {kl!r}")
    if isinstance(starts, bool) or starts < 0:
        raise InputError(f"starts must be a whole number >= 0; got {starts!r}")
    if kl is not None:
        _check_reach(h, base, kl)
    found = judged_optimum(procedure, base, h, beta, kl, starts)
    if found is None or (kl is not None and found.beta < SMALLEST_BETA):
        given = f"kl {kl:g}" if kl is not None else f"beta {beta:g}"
        raise InputError(f"no gold optimum of {procedure!r} at {given} was found with a beta that training can use")
    return _transform(procedure, h, base, found.policy_masses_J, beta or found.beta, found.kl, found.win_rate)


def gold_win_rate(procedure: Procedure, h_J: ArrayLike, policy_masses_J: ArrayLike) -> float:
    """Gold W = sum_j h_j [G(Q_j) - G(Q_{j-1})] of a policy on levels, decoded by `procedure` (equation 16).

    h_J: (J,) in [0, 1], ascending in the proxy; the opponent is the one that h is about. policy_masses_J: (J,).
    Raises InputError for values out of range, masses that do not sum to 1, or different lengths.

    >>> from infalign.theory.procedures import BestOfN
    >>> gold_win_rate(BestOfN(2), [0.25, 0.75], [0.5, 0.5])
    0.625
    """
    check_procedure(procedure)
    h, policy = _judged_levels(h_J, policy_masses_J, "policy_masses_J", drop=False)
    decoded = procedure.cdf(np.minimum(np.concatenate([[0.0], np.cumsum(policy)]), 1.0))
    return float(h @ np.diff(decoded))


def gold_win_rates(h_J: ArrayLike, procedures: Sequence[Procedure], base_masses_J: ArrayLike | None = None) -> Floats:
    """The base's own gold W when each of `procedures` decodes it: which N to deploy without training, (len,).

    The opponent of all of them is the same: the base's decoded sample that h is about, not the base decoded by the
    procedure of the row. So the row of h's own procedure is 1/2 up to the error of h, and where h falls at the top the
    gold W of Best-of-N first rises with N and then falls. h_J and base_masses_J: as for `gold_optimal`.

    >>> from infalign.theory.procedures import BestOfN
    >>> h = [0.2, 0.4, 0.6, 0.8, 0.3]  # the top fifth is hacked
    >>> gold_win_rates(h, [BestOfN(n) for n in (1, 2, 4, 8)]).round(3).tolist()
    [0.46, 0.508, 0.473, 0.38]
    """
    h, base = _judged_levels(h_J, base_masses_J)
    return np.array([gold_win_rate(procedure, h, base) for procedure in procedures])


def _judged_levels(
    h_J: ArrayLike, masses_J: ArrayLike | None, name: str = "base_masses_J", drop: bool = True
) -> tuple[Floats, Floats]:
    """h and masses of the levels (with `drop`, those that have mass), checked: two (J,) arrays."""
    h = np.asarray(h_J, dtype=float)
    if h.ndim != 1 or h.size == 0 or not np.all((h >= 0) & (h <= 1)):
        raise InputError(f"h_J must be a list of chances in [0, 1], one for each level; got {h_J!r}")
    masses = np.full(len(h), 1 / len(h)) if masses_J is None else np.asarray(masses_J, dtype=float)
    if masses.shape != h.shape or not np.all(masses >= 0) or not abs(masses.sum() - 1) <= 1e-6:
        raise InputError(f"{name} must be {len(h)} masses >= 0 that sum to 1, one for each of h_J; got {masses_J!r}")
    kept = masses > 0 if drop else np.ones(len(h), dtype=bool)
    return h[kept], masses[kept] / masses.sum()


def _check_reach(h: Floats, base: Floats, kl: float) -> None:
    """Raise for a KL that no optimum has."""
    if np.ptp(h) == 0:
        raise InputError("h_J is constant: the proxy tells nothing of the gold reward, so no policy gains: use another")
    most = -math.log(float(base[h == h.max()].sum()))
    if kl >= most - 1e-9:
        raise InputError(f"no gold optimum needs {kl:g} nats: with all mass where h_J is highest KL is {most:.6g}")


def _transform(
    procedure: Procedure, h: Floats, base: Floats, policy: Floats, beta: float, kl: float, win_rate: float
) -> JudgedTransform:
    """The levels' rewards from the policy, and what goes with them."""
    below = np.minimum(np.cumsum(policy)[:-1], 1.0)
    phi = np.concatenate([[0.0], np.cumsum(np.diff(h) * procedure.density(below))])
    # rounded, so that another order of summation on another machine gives the same digest
    rounded = np.round(np.concatenate([h, base]), 6) + 0.0
    digest = hashlib.blake2b(rounded.tobytes(), digest_size=4).hexdigest()
    return JudgedTransform(procedure, beta, kl, digest, win_rate, h, base, policy, phi)
