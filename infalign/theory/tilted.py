"""KL-regularised optimal policies of a transformed reward: q(u) = exp(Phi(u)/beta)/Z in base-quantile coordinates.

Closed forms for the catalogue (log Z is kept, never Z; nothing overflows), adaptive quadrature for any other callable.
Without ties, KL and win rates depend on neither the reward, the base policy nor the prompt.

Theory: InfAlign (arXiv:2412.19792); equation 3 and the closed forms of README.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, special

from infalign.theory.procedures import Procedure, check_procedure
from infalign.theory.quadrature import graded_edges, integrate, panel_integrals, panel_nodes, refined_edges
from infalign.theory.transforms import Exponential, Identity, Log, LogMirror, NormalIcdf
from infalign.types import InputError

Floats = NDArray[np.float64]
Function = Callable[[Floats], Floats]

SMALLEST_KL, LARGEST_KL = 1e-9, 50.0


@dataclass(frozen=True)
class TiltedPolicy:
    """The policy q = exp(Phi/beta)/Z, the optimum of E[Phi(C)] - beta KL.

    `beta` > 0, `kl` in nats (sequence KL to the base policy), `log_partition` = log Z of Phi as it is.
    """

    transform: Callable[[ArrayLike], Floats]
    beta: float
    kl: float
    log_partition: float
    _density: Function = field(repr=False, compare=False)
    _cdf: Function = field(repr=False, compare=False)

    def density(self, u: ArrayLike) -> Floats:
        """q(u) >= 0 at base quantiles u in [0, 1], any shape; raises InputError outside."""
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            return self._density(quantiles(u))

    def cdf(self, u: ArrayLike) -> Floats:
        """Q(u), the policy's mass below base quantile u in [0, 1], any shape; raises InputError outside."""
        with np.errstate(divide="ignore", over="ignore", under="ignore"):
            return np.clip(self._cdf(quantiles(u)), 0.0, 1.0)

    def win_rate(self, procedure: Procedure) -> float:
        """W = 1 - int_0^1 g(u) G(Q(u)) du against the base policy, both decoded by `procedure`.

        >>> from infalign.theory.procedures import BestOfN
        >>> from infalign.theory.transforms import log
        >>> round(tilt(log, beta=1 / 3).win_rate(BestOfN(4)), 9)  # the Best-of-4 policy: 4/5 for every N
        0.8
        """
        return win_rate_of(self.cdf, procedure)


def tilt(transform: Callable[[ArrayLike], Floats], beta: float | None = None, kl: float | None = None) -> TiltedPolicy:
    """The tilted policy of `transform` at `beta`, or at the beta that gives `kl` nats; give exactly one.

    transform: u -> Phi(u), vectorised on [0, 1] (it may be infinite at the ends). Raises InputError for both or
    neither, a beta that is not positive, a partition function that diverges, or a KL that no beta reaches.

    >>> from infalign.theory.transforms import identity
    >>> round(tilt(identity, beta=0.2).kl, 8), round(tilt(identity, kl=1.0).beta, 6)
    (0.65011694, 0.136064)
    """
    beta, kl = one_of(beta, kl)
    if beta is not None:
        return _at(transform, 1 / beta)
    assert kl is not None
    return _reaching(transform, kl)


def one_of(beta: float | None, kl: float | None) -> tuple[float | None, float | None]:
    """(beta, kl) with exactly one given and valid; raises InputError otherwise.

    >>> one_of(0.1, None)
    (0.1, None)
    """
    if (beta is None) == (kl is None):
        raise InputError(f"give exactly one of beta and kl; got {'neither' if beta is None else 'both'}")
    if beta is not None and not (beta > 0 and math.isfinite(beta)):
        raise InputError(f"beta must be a finite number > 0; got {beta!r}")
    if kl is not None and not SMALLEST_KL <= kl <= LARGEST_KL:
        raise InputError(f"kl must lie in [{SMALLEST_KL:g}, {LARGEST_KL:g}] nats; got {kl!r}")
    return (None if beta is None else float(beta)), (None if kl is None else float(kl))


def win_rate_of(cdf: Callable[[Floats], Floats], procedure: Procedure) -> float:
    """W = 1 - int_0^1 g(u) G(Q(u)) du of the policy with CDF Q in base quantiles (README.md, equation 4)."""
    check_procedure(procedure)
    return 1.0 - integrate(lambda u: procedure.density(u) * procedure.cdf(cdf(u)))


def quantiles(u: ArrayLike) -> Floats:
    """u as floats in [0, 1]."""
    u = np.asarray(u, dtype=float)
    if not np.all((u >= 0) & (u <= 1)):
        raise InputError(f"u must lie in [0, 1]; got values in [{np.min(u)}, {np.max(u)}]")
    return u


def _at(transform: Callable[[ArrayLike], Floats], inverse: float) -> TiltedPolicy:
    """The tilted policy at 1/beta = inverse, by a closed form where there is one."""
    laws: dict[type, Callable[[float], tuple[float, float, Function, Function]]] = {
        Identity: _identity,
        Log: _log,
        LogMirror: _log_mirror,
        NormalIcdf: _normal,
    }
    closed = laws.get(type(transform))
    if closed is not None:
        return TiltedPolicy(transform, 1 / inverse, *closed(inverse))
    if isinstance(transform, Exponential) and 1e-3 <= abs(transform.t) <= 500 and inverse > 1e-80:
        return TiltedPolicy(transform, 1 / inverse, *_exponential(transform.t, inverse))
    return TiltedPolicy(transform, 1 / inverse, *_by_quadrature(transform, inverse))


def _reaching(transform: Callable[[ArrayLike], Floats], kl: float) -> TiltedPolicy:
    """The tilted policy with the given KL: a bracket and a root in x, with 1/beta = e^x (log mirror: logistic(x))."""
    mirror = isinstance(transform, LogMirror)

    def policy(x: float) -> TiltedPolicy:
        return _at(transform, float(special.expit(x)) if mirror else math.exp(x))

    def excess(x: float) -> float:
        return math.log(max(policy(x).kl, 1e-300) / kl)

    # beta starts at e^6 = 400. A step down by 2 divides a small KL (~ 1/beta^2) by about 55.
    low = high = -6.0
    while excess(low) > 0:
        low -= 2.0
    try:
        while excess(high) < 0:
            high += 1.0
            # 1/beta of e^70: a KL that is not reached by then has levelled off
            if high > 70:
                raise InputError(f"its KL stays near {policy(high).kl:.6g}")
    except InputError as error:
        raise InputError(f"transform {transform!r} reaches no KL of {kl:g} nats: {error}; lower kl") from error
    if high <= low:  # the KL at the first guess is the one wanted
        return policy(low)
    return policy(float(optimize.brentq(excess, low, high, xtol=1e-14, rtol=1e-14)))


def _identity(l: float) -> tuple[float, float, Function, Function]:  # noqa: E741
    """KL, log Z, q, Q of Phi = u: Q = (e^{lu}-1)/(e^l-1)."""
    spread = -math.expm1(-l)
    log_z = l + math.log(spread / l)
    # E[u] under q. For small l the two terms cancel, so there the series (Bernoulli numbers) takes over.
    mean = 1 / spread - 1 / l if l > 0.05 else 0.5 + l / 12 - l**3 / 720 + l**5 / 30240 - l**7 / 1209600

    def cdf(u: Floats) -> Floats:
        # (e^{lu}-1)/(e^l-1) with e^-l taken out above and below, so that no large l overflows
        return np.exp(l * (u - 1)) * -np.expm1(-l * u) / spread

    return l * mean - log_z, log_z, lambda u: np.exp(l * u - log_z), cdf


def _log(l: float) -> tuple[float, float, Function, Function]:  # noqa: E741
    """KL, log Z, q, Q of Phi = log u: Q = u^m, m = 1 + l, the Best-of-m policy."""
    m = 1 + l
    return math.log1p(l) - l / m, -math.log1p(l), lambda u: m * u**l, lambda u: u**m


def _log_mirror(l: float) -> tuple[float, float, Function, Function]:  # noqa: E741
    """KL, log Z, q, Q of Phi = -log(1-u): 1-Q = (1-u)^c, c = 1 - l > 0."""
    c = 1 - l
    if c <= 0:
        raise InputError(f"log_mirror needs beta > 1, or its partition function diverges; got beta={1 / l:g}")

    def cdf(u: Floats) -> Floats:
        return -np.expm1(c * np.log1p(-u))

    return math.log1p(-l) + l / c, -math.log1p(-l), lambda u: c * (1 - u) ** -l, cdf


def _normal(s: float) -> tuple[float, float, Function, Function]:
    """KL, log Z, q, Q of the normal quantile: a shift of the normal by s = 1/beta."""

    def density(u: Floats) -> Floats:
        return np.exp(s * special.ndtri(u) - s * s / 2)

    return s * s / 2, s * s / 2, density, lambda u: special.ndtr(special.ndtri(u) - s)


def _exponential(t: float, l: float) -> tuple[float, float, Function, Function]:  # noqa: E741
    """KL, log Z, q, Q of the exponential transformations, both signs at once.

    With a(u) = Phi(u)/beta, a' = t a, so int e^a du = [Ei(a(u)) - Ei(a(0))]/t; all is scaled by e^{-a(1)}.
    """
    low, high = (l * math.exp(-t), l) if t > 0 else (-l, -l * math.exp(t))  # a(0) and a(1)
    scaled_low = float(_scaled_ei(np.array(low)))

    def scaled_mass(a: Floats) -> Floats:
        return (_scaled_ei(a) * np.exp(a - high) - scaled_low * math.exp(low - high)) / t

    def exponent(u: Floats) -> Floats:
        return l * np.exp(t * (u - 1)) if t > 0 else -l * np.exp(t * u)

    scaled_z = float(scaled_mass(np.array(high)))
    log_z = high + math.log(scaled_z)
    # E[a] = int a e^a du / Z, and a e^a du = e^a da / t: the integral is [e^a(1) - e^a(0)] / t
    mean = -math.expm1(low - high) / (t * scaled_z)
    return (
        mean - log_z,
        log_z,
        lambda u: np.exp(exponent(u) - log_z),
        lambda u: scaled_mass(exponent(u)) / scaled_z,
    )


def _scaled_ei(x: Floats) -> Floats:
    """e^{-x} Ei(x) for x != 0 (x < 0: -e^{-x} E1(-x)), by the asymptotic series beyond |x| = 50."""
    # both branches are computed for every x, so each gets arguments that it can't overflow on
    near = np.clip(x, -50, 50)
    far = np.where(np.abs(x) > 50, x, 50.0)
    term, total = np.ones_like(far), np.ones_like(far)
    for k in range(1, 40):
        # e^{-x} Ei(x) ~ 1/x sum_k k!/x^k: for |x| > 50 its terms still fall at k = 39
        term = term * k / far
        total = total + term
    return np.where(np.abs(x) > 50, total / far, special.expi(near) * np.exp(-near))


def _by_quadrature(transform: Callable[[ArrayLike], Floats], inverse: float) -> tuple[float, float, Function, Function]:
    """KL, log Z, q, Q of any vectorised callable."""
    exponent = partial(_exponent, transform, inverse)
    edges = graded_edges()
    # the largest exponent seen is taken off: e^a is about 1 at most
    shift = float(np.max(exponent(panel_nodes(edges[:-1], edges[1:])[0])))
    if not math.isfinite(shift):
        raise InputError(f"transform {transform!r} must be finite somewhere inside (0, 1), and +inf nowhere there")

    def mass(u: Floats) -> Floats:
        a = exponent(u) - shift
        # panels must resolve the partition function, e^a, and the KL, a e^a; -700 keeps 0 * inf out of it
        return np.exp(a) * (1 + np.abs(np.maximum(a, -700)))

    edges = refined_edges(mass, edges)
    # (E, 16) nodes: mass_EK is what each node adds, below_E (E+1,) the mass below each edge
    nodes, weights = panel_nodes(edges[:-1], edges[1:])
    a = exponent(nodes) - shift
    mass_EK = np.exp(a) * weights
    total = float(mass_EK.sum())
    below_E = np.concatenate([[0.0], np.cumsum(mass_EK.sum(1))])
    # The outermost panels are 1e-301 and 2e-16 wide. Mass in them is not resolved: more would be further out.
    if not math.isfinite(total) or below_E[1] > 1e-6 * total or total - below_E[-2] > 1e-6 * total:
        raise InputError(f"transform {transform!r} at beta={1 / inverse:g}: its policy piles up at an end, or diverges")

    def cdf(u: Floats) -> Floats:
        panel = np.clip(np.searchsorted(edges, u, side="right") - 1, 0, len(edges) - 2)
        return below_E[panel] / total + panel_integrals(density, edges[panel], u)

    def density(u: Floats) -> Floats:
        return np.exp(exponent(u) - shift) / total

    # E[a] - log total; the shift is in Phi/beta and in log Z, and cancels
    kl = float((mass_EK * np.maximum(a, -1e6)).sum()) / total - math.log(total)
    return kl, shift + math.log(total), density, cdf


def _exponent(transform: Callable[[ArrayLike], Floats], inverse: float, u: Floats) -> Floats:
    """Phi(u)/beta; InputError unless the callable is vectorised and free of NaN."""
    value = np.asarray(transform(u), dtype=float)
    if value.shape != u.shape or np.isnan(value).any():
        raise InputError(f"transform {transform!r} must map an array to as many numbers, none NaN; shape {value.shape}")
    return value * inverse
