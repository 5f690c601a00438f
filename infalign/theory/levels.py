"""The one solver: the best policy for a procedure on reward levels, and on very many of them for continuous rewards.

Rewards take J levels of base mass b_j and policy mass p_j, ascending; P and Q are the cumulative masses. Level j of the
decoded policy gets G(Q_j) - G(Q_{j-1}), so (README.md, equation 7)

    W = 1 - 1/2 sum_j [G(P_j) - G(P_{j-1})] [G(Q_j) + G(Q_{j-1})],

and every optimum at a KL or a beta satisfies, with x_j = log(p_j/b_j) (equation 8),

    x_{j+1} - x_j = g(Q_j) [G(P_{j+1}) - G(P_{j-1})] / (2 beta):

a tridiagonal system, solved by Newton steps bordered with the KL. It is unique when g is non-decreasing; otherwise the
best of several starts is kept. A coarse reward can be far from the continuous limit: a fair coin's with Best-of-4 never
exceeds .531.

Where another reward judges than the one that decodes, h_j in place of [G(P_j) + G(P_{j-1})]/2 is what level j is worth,
and its steps h_{j+1} - h_j stand in place of [G(P_{j+1}) - G(P_{j-1})]/2 (`judged.py`). They may be negative.

A continuous reward is the limit of many levels. On a cut that follows the solution, W, log beta and Q err by
c/J^2 + O(1/J^4), so J levels and each of them halved extrapolate (Richardson) to some 1e-9 (`continuous_optimum`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize
from scipy.linalg import lapack

from infalign.theory.procedures import Procedure, check_procedure
from infalign.theory.tilted import one_of
from infalign.types import InputError

Floats = NDArray[np.float64]

LEVELS = 1200
"""J of the coarser of the two resolutions that a continuous optimum is extrapolated from."""
_NOTHING_LEFT = -30.0  # log beta
_COARSE = 250  # levels of the cuts that only find out where levels are needed
SMALLEST_KL, LARGEST_KL = 1e-9, 25.0
_MOST_STEPS = 60  # of Newton, which takes two to seven from a good start
_LARGEST_LOG_BETA = 600.0  # e^600 is still a finite float
_SUP_SLACK = 1e-9  # nats below the KL of all mass on top, from which on that policy is the answer


@dataclass(frozen=True)
class TiedPolicy:
    """An optimal policy on reward levels: `policy_masses_J` sum to 1; `beta` is 0 at the limit of all mass on top."""

    policy_masses_J: Floats
    beta: float
    kl: float
    win_rate: float


def tied_win_rate(procedure: Procedure, base_masses_J: ArrayLike, policy_masses_J: ArrayLike) -> float:
    """W of a policy against the base on reward levels, both decoded by `procedure`, ties counting one half.

    base_masses_J, policy_masses_J: (J,) masses of the same levels in ascending reward, each summing to 1.
    Raises InputError for negative masses, sums other than 1 or different lengths.

    >>> from infalign.theory.procedures import BestOfN
    >>> tied_win_rate(BestOfN(4), [0.5, 0.5], [0.0, 1.0])
    0.53125
    """
    check_procedure(procedure)
    base_J, policy_J = _masses("base_masses_J", base_masses_J), _masses("policy_masses_J", policy_masses_J)
    if len(base_J) != len(policy_J):
        raise InputError(f"base and policy masses must be of the same levels; got {len(base_J)} and {len(policy_J)}")
    return _win_rate(procedure, base_J, policy_J)


def tied_optimum(
    procedure: Procedure, base_masses_J: ArrayLike, beta: float | None = None, kl: float | None = None
) -> TiedPolicy:
    """The best policy on reward levels at `beta`, or with at most `kl` nats; give exactly one.

    base_masses_J: (J,) masses in ascending reward; levels of base mass 0 get policy mass 0. The KL can't exceed
    -log(mass of the top level): beyond it, all mass is on top. Raises InputError for bad masses, both or neither.

    >>> from infalign.theory.procedures import BestOfN
    >>> tied_optimum(BestOfN(4), [0.5, 0.5], kl=1.0).win_rate
    0.53125
    """
    check_procedure(procedure)
    beta, kl = one_of(beta, kl)
    base_J = _masses("base_masses_J", base_masses_J)
    kept_J = base_J > 0
    levels = _Levels(procedure, base_J[kept_J])
    best = levels.at_kl(kl) if kl is not None else levels.at_beta(beta or 0.0)
    masses_J = np.zeros_like(base_J)
    masses_J[kept_J] = best.mass_J
    return TiedPolicy(masses_J, best.beta, best.kl, best.win_rate)


def judged_optimum(
    procedure: Procedure, base_J: Floats, judged_J: Floats, beta: float | None, kl: float | None, peaks: int
) -> TiedPolicy | None:
    """`tied_optimum` where level j is worth judged_J[j]: see `judged.gold_optimal`, which checks the arguments.

    base_J: all positive. Returns None where nothing satisfies the equations, or no policy needs `kl` nats.
    """
    levels = _Levels(procedure, base_J, judged_J, peaks)
    if kl is not None and kl >= levels.most_kl - _SUP_SLACK:
        return None
    best = levels.at_kl(kl) if kl is not None else levels.at_beta(beta or 0.0)
    return TiedPolicy(best.mass_J, best.beta, best.kl, best.win_rate) if best.converged else None


def tied_limit(procedure: Procedure, base_masses_J: ArrayLike, kl: float) -> float:
    """The highest win rate of any policy within `kl` nats of the base on these reward levels; non-decreasing in kl.

    kl = 0 gives 1/2. Raises InputError like `tied_optimum`.

    >>> from infalign.theory.procedures import BestOfN
    >>> round(tied_limit(BestOfN(1), [0.5, 0.5], 0.1), 6)
    0.609897
    """
    if kl == 0:
        _masses("base_masses_J", base_masses_J)
        return 0.5
    return tied_optimum(procedure, base_masses_J, kl=kl).win_rate


@dataclass(frozen=True)
class ContinuousPolicy:
    """An optimal policy for a reward without ties, on a cut that follows it: each (2J+1,), u ascending.

    `below` is u and `above` 1 - u, each accurate relative to itself; `cdf` and `survival` are Q and 1 - Q there.
    """

    below: Floats
    above: Floats
    cdf: Floats
    survival: Floats
    log_beta: float
    kl: float
    win_rate: float


def continuous_optimum(
    procedure: Procedure, log_beta: float | None = None, kl: float | None = None
) -> ContinuousPolicy:
    """The optimum for a reward without ties, at log beta or at a KL in nats (exactly one given); README.md, equation 9.

    Raises:
        InputError: none was found.
    """
    # A cut follows the solution at one KL. For a given beta that KL is not known yet: 1 % is near enough to begin with.
    levels = _Levels(procedure, _widths(*_first_edges()))
    if kl is not None:
        near = kl
    else:
        assert log_beta is not None
        near = levels.kl_at(log_beta, levels.tilted_kl(log_beta), 1e-2)
    for count in (_COARSE, _COARSE, LEVELS):  # the second coarse cut follows a solution that the first could resolve
        policy = levels.near(near, log_beta)
        near = near if abs(policy.kl / near - 1) < 1e-6 else policy.kl
        levels = _Levels(procedure, _widths(*levels.cut_along(policy, count)))
    # The same edges twice, the second time with every level halved: only then is the error c/J^2 with one c.
    one = levels.near(near, log_beta)
    halved = _Levels(procedure, np.repeat(levels.base_J / 2, 2))
    fixed_kl = near if log_beta is None else None
    # both halves of a level start from its density ratio
    two = halved.newton(np.repeat(one.log_ratio_J, 2), one.log_beta, fixed_kl) or halved.near(near, log_beta)
    if not (one.converged and two.converged):
        return _at_less(procedure, near)
    return ContinuousPolicy(
        _with_middles(levels.below),
        _with_middles(levels.above),
        _extrapolated_curve(_cumulative(one.mass_J), _cumulative(two.mass_J)),
        _extrapolated_curve(_from_top(one.mass_J), _from_top(two.mass_J)),
        _extrapolated(one.log_beta, two.log_beta),
        kl or _extrapolated(one.kl, two.kl),
        min(_extrapolated(one.win_rate, two.win_rate), 1.0),
    )


def _at_less(procedure: Procedure, kl: float) -> ContinuousPolicy:
    """The optimum at half of a KL at which Newton finds none, if its beta is so small that the other half adds nothing.

    Raises:
        InputError: it is not.
    """
    found = continuous_optimum(procedure, kl=kl / 2) if kl > 1e-3 else None
    if found is None or found.log_beta > _NOTHING_LEFT:
        raise InputError(f"no optimum of {procedure!r} was found at {kl:g} nats: ask for another kl")
    return found


def _extrapolated(coarse: float, fine: float) -> float:
    """Richardson: halving the levels takes three quarters of an error c/J^2 away; a third of the gain is missing."""
    return fine + (fine - coarse) / 3 if math.isfinite(fine) and math.isfinite(coarse) else fine


def _extrapolated_curve(coarse: Floats, fine: Floats) -> Floats:
    """The same for Q, which the coarse levels know at every other edge; what is missing is smooth: (2J+1,)."""
    return fine + _with_middles((fine[::2] - coarse) / 3)


def _with_middles(values: Floats) -> Floats:
    """Values at edges, and between them their means: (2J+1,) from (J+1,)."""
    found = np.repeat(values, 2)[:-1]
    found[1::2] = (values[1:] + values[:-1]) / 2
    return found


def _first_edges() -> tuple[Floats, Floats]:
    """u and 1 - u at edges to begin with: even in the middle, by constant factors towards both ends."""
    # e^-32 is 1e-14. Next to u = 1 floats can't tell such steps apart, but 1 - u can: so both are kept.
    tail = np.exp(np.linspace(-32.0, -2.5, 90))
    middle = np.linspace(0.1, 0.9, 65)
    below = np.concatenate([[0.0], tail, middle, 1 - tail[::-1], [1.0]])
    above = np.concatenate([[1.0], 1 - tail, 1 - middle, tail[::-1], [0.0]])
    return below, above


def _widths(below: Floats, above: Floats) -> Floats:
    """Masses between edges, each accurate relative to itself: (J,) from (J+1,)."""
    # the difference is taken of whichever is small, because rounding is relative to the size of the number
    return np.where(below[1:] < 0.5, np.diff(below), -np.diff(above))


def _masses(name: str, masses: ArrayLike) -> Floats:
    """The masses as floats that sum to 1 exactly enough; InputError otherwise."""
    masses_J = np.asarray(masses, dtype=float)
    if masses_J.ndim != 1 or masses_J.size == 0 or not np.all(masses_J >= 0) or not abs(masses_J.sum() - 1) <= 1e-6:
        raise InputError(f"{name} must be non-negative and sum to 1; got {masses!r}")
    return masses_J / masses_J.sum()


def _cumulative(masses_J: Floats) -> Floats:
    """0, P_1, ..., P_J = 1: (J+1,)."""
    # sums may exceed 1 by rounding, and G is defined on [0, 1] only
    total = np.minimum(np.concatenate([[0.0], np.cumsum(masses_J)]), 1.0)
    total[-1] = 1.0
    return total


def _from_top(masses_J: Floats) -> Floats:
    """1, 1 - P_1, ..., 0, accurate relative to itself near the top: (J+1,)."""
    return _cumulative(masses_J[::-1])[::-1]


def _win_rate(procedure: Procedure, base_J: Floats, policy_J: Floats) -> float:
    """The equation of the module's first paragraph."""
    decoded_base = procedure.cdf(_cumulative(base_J))
    decoded = procedure.cdf(_cumulative(policy_J))
    return 1.0 - 0.5 * float(np.diff(decoded_base) @ (decoded[1:] + decoded[:-1]))


@dataclass(frozen=True)
class _Policy:
    """A policy on levels: x = log(p/b) and masses p (J,), log beta (-inf: all mass on top), KL, W.

    One that has not `converged` is a tilt within the KL asked for, and no optimum.
    """

    log_ratio_J: Floats
    mass_J: Floats
    log_beta: float
    kl: float
    win_rate: float
    converged: bool = True

    @property
    def beta(self) -> float:
        return math.exp(self.log_beta)

    def gain(self, beta: float) -> float:
        """What is maximised at a beta."""
        return self.win_rate - beta * self.kl


class _Levels:
    """The problem on levels of base masses (J,), all positive; c_j = [G(P_{j+1}) - G(P_{j-1})]/2, (J-1,).

    With `judged_J`, the levels' worth (J,) under another reward, c_j are its steps; `peaks` of it are tried as starts.
    """

    def __init__(self, procedure: Procedure, base_J: Floats, judged_J: Floats | None = None, peaks: int = 0) -> None:
        self.procedure, self.base_J, self.judged_J, self.peaks = procedure, base_J, judged_J, peaks
        self.log_base_J = np.log(base_J)
        self.from_top = procedure.monotone == "decreasing"
        self.below, self.above = _cumulative(base_J), _from_top(base_J)
        decoded, undecoded = procedure.cdf(self.below), procedure.mirror.cdf(self.above)
        # G(P) near 1 has lost its small differences; those of 1 - G(P), which the mirror knows, have not
        low, high = decoded[2:] - decoded[:-2], undecoded[:-2] - undecoded[2:]
        self.coupling = np.where(decoded[1:-1] < 0.5, low, high) / 2 if judged_J is None else np.diff(judged_J)
        self.falls = judged_J is not None and bool(np.any(self.coupling < 0))
        # where all mass goes as beta -> 0: to the top level, or to those worth most
        self.highest = np.array([len(base_J) - 1]) if judged_J is None else np.flatnonzero(judged_J == judged_J.max())
        self.most_kl = -math.log(float(base_J[self.highest].sum()))  # and the KL of that

    def at_kl(self, kl: float) -> _Policy:
        """The best policy found within kl."""
        if kl >= self.most_kl - _SUP_SLACK:
            return self._top()
        found = [self._from_start(shape, kl) for shape in self._starts()]
        # of many local optima some starts find none: a mere tilt must not hide an optimum
        return max(found, key=lambda policy: (policy.converged or not self.falls, policy.win_rate))

    def at_beta(self, beta: float) -> _Policy:
        """The best W - beta KL: a scan over KL, then Newton at fixed beta from the best."""
        plain = 0.5 if self.judged_J is None else self._win_rate(self.base_J)
        uniform = _Policy(np.zeros_like(self.base_J), self.base_J, math.log(beta), 0.0, plain)
        if len(self.base_J) == 1:
            return uniform
        # shares of the largest KL: powers of ten for a large beta, then even steps, denser next to the end
        grid = self.most_kl * np.concatenate([10.0 ** np.arange(-6, -1), np.linspace(0.02, 0.98, 49), [0.995, 1.0]])
        if self.falls:  # with as many starts each: every fifth will do, for Newton begins from the same rewards at beta
            grid = grid[::5]
        scanned = [uniform, *(self.at_kl(float(kl)) for kl in grid[grid > _SUP_SLACK])]
        best = max(scanned, key=lambda policy: policy.gain(beta))
        if self.falls:
            found = (policy for policy in scanned[1:] if math.isfinite(policy.log_beta))
            nearest = sorted(found, key=lambda policy: -policy.gain(beta))[:3]
            polished = [self.newton(self._retilted(policy, math.log(beta)), math.log(beta), None) for policy in nearest]
            best = max([best, *filter(None, polished)], key=lambda policy: policy.gain(beta))
        # where all mass is on top the other levels have x = -inf, from which Newton can't start
        polished = self.newton(np.maximum(best.log_ratio_J, -50.0), math.log(beta), None)
        if polished is None or polished.gain(beta) < best.gain(beta):
            return _Policy(best.log_ratio_J, best.mass_J, math.log(beta), best.kl, best.win_rate)
        return polished

    def kl_at(self, log_beta: float, guess: float, tolerance: float) -> float:
        """The KL of the optimum at log beta up to a relative tolerance: beta = dW/dKL falls along the frontier."""

        @cache
        def excess(log_kl: float) -> float:
            return self.at_kl(math.exp(log_kl)).log_beta - log_beta

        least, most = math.log(SMALLEST_KL), math.log(LARGEST_KL)
        low = high = min(max(math.log(max(guess, SMALLEST_KL)), least), most)
        # beta falls as the KL grows, so excess does too: the bracket widens by factors of e
        while excess(low) < 0 and low > least:
            low -= 1.0
        while excess(high) > 0 and high < most:
            high += 1.0
        if low == high or excess(low) < 0:  # hardly any KL: Newton at this beta gets there from the smallest
            return math.exp(low)
        return math.exp(float(optimize.brentq(excess, low, high, xtol=tolerance)))

    def near(self, kl: float, log_beta: float | None) -> _Policy:
        """The optimum at a KL or, where log beta is given, the one at it, whose KL is about `kl`."""
        start = self.at_kl(kl)
        if log_beta is None:
            return start
        found = self.newton(self._retilted(start, log_beta), log_beta, None)
        return found or replace(self.at_kl(self.kl_at(log_beta, kl, 1e-12)), log_beta=log_beta)

    def _retilted(self, policy: _Policy, log_beta: float) -> Floats:
        """log(p/b) (J,) of the tilt at log beta of the rewards that a policy is a tilt of."""
        # x = R / beta_start + const, so R / beta is x times beta_start / beta
        reward_J = policy.log_ratio_J - policy.log_ratio_J.max()
        scale = math.exp(min(policy.log_beta - log_beta, _LARGEST_LOG_BETA))
        exponent_J = np.maximum(reward_J, -1e300 / max(scale, 1e-300)) * scale
        return exponent_J - self._log_partition(exponent_J)

    def tilted_kl(self, log_beta: float) -> float:
        """The KL that the first tilt has at log beta, by which to guess that of the optimum."""
        exponent_J = np.maximum(self._starts()[0] * math.exp(-log_beta), -1e4)
        return self._kl(exponent_J - self._log_partition(exponent_J))

    def cut_along(self, policy: _Policy, count: int) -> tuple[Floats, Floats]:
        """u and 1 - u at the edges of `count` levels that share evenly what u, Q, G(u), G(Q) and log q/10 change by."""
        cdf, mirror = self.procedure.cdf, self.procedure.mirror.cdf
        Q, survival = _cumulative(policy.mass_J), _from_top(policy.mass_J)
        # a density below e^-30 of the base's is 0 for every purpose: how its log moves needs no levels
        x = np.maximum(policy.log_ratio_J, -30.0)
        x = np.concatenate([x[:1], (x[1:] + x[:-1]) / 2, x[-1:]])  # from levels (J,) to edges (J+1,)
        moved = self.base_J + policy.mass_J + 0.1 * np.abs(np.diff(x))
        moved = moved + _widths(cdf(self.below), mirror(self.above)) + _widths(cdf(Q), mirror(survival))
        total = np.concatenate([[0.0], np.cumsum(moved)])
        # invert the cumulative change: the level that each new edge falls into, and where in it
        wanted = np.linspace(0.0, float(total[-1]), count + 1)[1:-1]
        level = np.searchsorted(total, wanted, side="right") - 1
        part = (wanted - total[level]) / moved[level]
        below = self.below[level] + part * self.base_J[level]
        # 1 - u is built up from the next edge above, not as 1 - below, so that it stays exact near the top
        above = self.above[level + 1] + (1 - part) * self.base_J[level]
        return np.concatenate([[0.0], below, [1.0]]), np.concatenate([[1.0], above, [0.0]])

    def _win_rate(self, policy_J: Floats) -> float:
        """W, or the gold W = sum_j h_j [G(Q_j) - G(Q_{j-1})] of judged levels."""
        if self.judged_J is None:
            return _win_rate(self.procedure, self.base_J, policy_J)
        return float(self.judged_J @ np.diff(self.procedure.cdf(_cumulative(policy_J))))

    def _top(self) -> _Policy:
        """All mass on the top level (or those worth most): the limit beta -> 0 of every procedure."""
        top_J = np.zeros_like(self.base_J)
        top_J[self.highest] = self.base_J[self.highest] / self.base_J[self.highest].sum()
        with np.errstate(divide="ignore"):
            log_ratio_J = np.log(top_J) - self.log_base_J
        return _Policy(log_ratio_J, top_J, -math.inf, self.most_kl, self._win_rate(top_J))

    def _starts(self) -> list[Floats]:
        """Rewards (J,) to start from: the gradient at the base and, where optima may be many, at other policies."""
        p = self.below[1:-1]
        # Q at P of three policies: the base, its Best-of-4 and its Worst-of-4. With a non-decreasing g the optimum is
        # unique, and the first will do; but where a judged level is worth less than the one below, W is not concave.
        unique = self.procedure.monotone == "constant" or (self.procedure.monotone == "increasing" and not self.falls)
        at = [p] if unique else [p, p**4, 1 - (1 - p) ** 4]
        starts = [self._reward(self.procedure.density(Q)) for Q in at]
        return starts if unique or not self.falls else [*starts, *self._peaked()]

    def _peaked(self) -> list[Floats]:
        """Rewards (J,) that lead to judged levels worth much: h itself, and tents over its highest local maxima."""
        assert self.judged_J is not None
        h, middle = self.judged_J, (self.below[1:] + self.below[:-1]) / 2
        sides = np.concatenate([[-np.inf], h, [-np.inf]])
        local = np.flatnonzero((h >= sides[:-2]) & (h > sides[2:]))  # of a plateau, its upper end
        highest = local[np.argsort(-h[local], kind="stable")][: self.peaks]
        return [h - h.max(), *(-np.abs(middle - middle[peak]) for peak in highest)]

    def _reward(self, density: Floats) -> Floats:
        """The levels' rewards (J,), the highest 0, for g at the policy's cumulative masses (J-1,)."""
        # R_{j+1} - R_j = c_j g(Q_j), added up from the top: R_J = 0, so that e^{R/beta} never overflows
        reward_J = np.concatenate([-np.cumsum((self.coupling * density)[::-1])[::-1], [0.0]])
        return reward_J - reward_J.max() if self.falls else reward_J

    def _decoded(self, mass_J: Floats) -> tuple[Floats, Floats]:
        """g and g' at Q_1..Q_{J-1}; from the top down where g lives on 1-Q, to keep its relative accuracy."""
        if self.from_top:
            # 1 - Q_1, ..., 1 - Q_{J-1}; the mirror's density at 1 - Q is g(Q), and d/dQ turns the sign of its slope
            above = np.minimum(np.cumsum(mass_J[:0:-1])[::-1], 1.0)
            return self.procedure.mirror.density(above), -self.procedure.mirror.slope(above)
        below = np.minimum(np.cumsum(mass_J)[:-1], 1.0)
        return self.procedure.density(below), self.procedure.slope(below)

    def _from_start(self, reward_J: Floats, kl: float) -> _Policy:
        """Newton from the tilt of reward_J at kl; if that fails, along a path of growing KL; else the tilt itself."""
        log_ratio_J, log_beta = self._tilted(reward_J, kl)
        for _ in range(3):  # an odd number: these tilts alternate around the optimum, and the first is too flat
            density, _ = self._decoded(self.base_J * np.exp(log_ratio_J))
            log_ratio_J, log_beta = self._tilted(self._reward(density), kl)
        log_beta = self._fitting_log_beta(log_ratio_J, log_beta)
        found = self.newton(log_ratio_J, log_beta, kl) or self._along_path(kl)
        return found or replace(self._policy(log_ratio_J, log_beta), converged=False)

    def _along_path(self, kl: float) -> _Policy | None:
        """Newton at a growing sequence of KLs, each started from the last; steps shrink where it fails.

        It may end before kl, where beta is so small that what is left adds nothing to W (at most beta a nat).
        """
        # at 1e-3 nats the tilt along the gradient at the base is nearly the optimum
        target, growth = min(kl, 1e-3), 8.0
        log_ratio_J, log_beta = self._tilted(self._starts()[0], target)
        reached = target / growth
        while growth > 1.02:
            found = self.newton(log_ratio_J, log_beta, target)
            if found is None:
                growth = math.sqrt(growth)  # 8, 2.8, 1.7, 1.3, 1.14, 1.07, 1.03, then it gives up
            elif target == kl or found.log_beta < _NOTHING_LEFT:
                return found
            else:
                reached, log_beta, log_ratio_J = target, found.log_beta, found.log_ratio_J
            target = min(reached * growth, kl)
        return None

    def _tilted(self, reward_J: Floats, kl: float) -> tuple[Floats, float]:
        """log(p/b) (J,) and log beta of p ~ b e^{R/beta} with the given KL, by safeguarded Newton in log(1/beta)."""
        # x is log(1/beta). For a small KL it is Var(R) / (2 beta^2), which gives the first x.
        spread = math.sqrt(float(self.base_J @ (reward_J - self.base_J @ reward_J) ** 2))
        x, low, high = 0.5 * math.log(2 * kl) - math.log(max(spread, 1e-300)), -math.inf, math.inf
        log_ratio_J, leap = np.zeros_like(reward_J), 2.0
        for _ in range(100):
            # e^-1e4 is 0 already, while 0 * -inf in the KL would be NaN
            tilt_J = np.maximum(reward_J * math.exp(min(x, _LARGEST_LOG_BETA)), -1e4)
            log_ratio_J = tilt_J - self._log_partition(tilt_J)
            value, mass_J = self._kl(log_ratio_J), self.base_J * np.exp(log_ratio_J)
            slope = float(mass_J @ (tilt_J - mass_J @ tilt_J) ** 2)  # d KL / d x
            low, high = (x, high) if value < kl else (low, x)
            if abs(value - kl) < 1e-9 * kl:
                break
            # Newton on log KL, which is nearly linear in x: 2x + const for a small KL
            new = x + math.log(kl / value) * value / slope if slope > 0 and value > 0 else math.inf
            if not (low < new < high and abs(new - x) < leap):
                # Bisect once there is a bracket. Before that one end is infinite: leap, twice as far each time.
                new = (low + high) / 2 if high - low < 1e9 else x + math.copysign(leap, kl - value)
                leap *= 2
            x = new
        return log_ratio_J, -x

    def _fitting_log_beta(self, log_ratio_J: Floats, log_beta: float) -> float:
        """The log beta at which a policy's steps fit its own gradient on average (log_beta where it has none)."""
        mass_J = self.base_J * np.exp(log_ratio_J)
        below = np.cumsum(mass_J)[:-1]
        # sum_j w_j (x_{j+1} - x_j) = sum_j w_j c_j g(Q_j) / beta, solved for beta; the ends weigh little
        weight = np.minimum(below, 1 - below)
        if self.falls:  # steps down count as they should be: down
            weight = weight * np.sign(self.coupling)
        pull, steps = weight @ (self.coupling * self._decoded(mass_J)[0]), weight @ np.diff(log_ratio_J)
        return math.log(pull / steps) if pull > 0 and steps > 0 else log_beta

    def _log_partition(self, exponent_J: Floats) -> float:
        """log sum b e^a, accurate also where it is nearly 0."""
        # Z - 1, as the base masses sum to 1
        excess = float(self.base_J @ np.expm1(exponent_J))
        return math.log1p(excess) if excess > -0.5 else math.log(float(self.base_J @ np.exp(exponent_J)))

    def _kl(self, log_ratio_J: Floats) -> float:
        """KL of a normalised policy: sum p x = sum b [x e^x - (e^x - 1)], whose small terms do not cancel."""
        return float(self.base_J @ (log_ratio_J * np.exp(log_ratio_J) - np.expm1(log_ratio_J)))

    def _policy(self, log_ratio_J: Floats, log_beta: float) -> _Policy:
        """The policy with its KL and win rate."""
        mass_J = self.base_J * np.exp(log_ratio_J)
        win_rate = min(self._win_rate(mass_J), 1.0)
        return _Policy(log_ratio_J, mass_J, log_beta, self._kl(log_ratio_J), win_rate)

    def newton(self, log_ratio_J: Floats, log_beta: float, kl: float | None) -> _Policy | None:
        """Newton on log(p/b) and, for a given kl, log beta; None when it does not converge."""
        for _ in range(_MOST_STEPS):
            if not abs(log_beta) < _LARGEST_LOG_BETA:
                return None
            step_J, step_beta = self._newton_step(log_ratio_J, log_beta, kl)
            # levels that hold nothing before and after the step say nothing about convergence
            seen_J = np.maximum(log_ratio_J + step_J, log_ratio_J) > -40
            size = max(float(np.abs(step_J[seen_J]).max(initial=0.0)), abs(step_beta))
            if not math.isfinite(size):
                return None
            # x and log beta are logarithms: no mass and no beta changes by more than a factor e^1.5 a step
            damping = min(1.0, 1.5 / size) if size > 0 else 1.0
            log_ratio_J, log_beta = log_ratio_J + damping * step_J, log_beta + damping * step_beta
            # after a step masses sum to 1 only to first order; the peak is taken off first lest e^x overflow
            peak = float(log_ratio_J.max())
            log_ratio_J = log_ratio_J - peak - self._log_partition(log_ratio_J - peak)
            if size < 1e-7:
                return self._policy(log_ratio_J, log_beta)
        return None

    def _newton_step(self, log_ratio_J: Floats, log_beta: float, kl: float | None) -> tuple[Floats, float]:
        """The full Newton step on x and, for a given kl, log beta.

        The unknowns interleave as x_1, Q_1, x_2, Q_2, ..., x_J, so that both kinds of equation touch neighbours only:
        -p_j dx_j + dQ_j - dQ_{j-1} = 0 (Q adds masses up), and the step equation of the module's first paragraph.
        """
        mass_J = self.base_J * np.exp(log_ratio_J)
        coupling = self.coupling * math.exp(-log_beta)
        density, slope = self._decoded(mass_J)
        pull = coupling * density
        size = 2 * len(mass_J) - 1
        # Rows alternate like the unknowns: 2(j-1) is -p_j dx_j + dQ_j - dQ_{j-1} = 0, and 2j-1 is
        # -dx_j - (c_j/beta) g'(Q_j) dQ_j + dx_{j+1} = residual - (c_j/beta) g(Q_j) dlog beta.
        sub, diagonal, sup = -np.ones(size - 1), np.empty(size), np.ones(size - 1)
        diagonal[0::2], diagonal[1::2] = -mass_J, -coupling * slope
        right = np.zeros((size, 2))  # the residual, and what a change of log beta adds
        right[1::2, 0], right[1::2, 1] = pull - np.diff(log_ratio_J), -pull
        solution, info = lapack.dgtsv(sub, diagonal, sup, right)[3:]
        if info != 0:
            return np.full_like(mass_J, np.nan), math.nan
        plain_J, along_J = solution[0::2, 0], solution[0::2, 1]
        if kl is None:
            return plain_J, 0.0
        # dKL = sum_j p_j (x_j + 1) dx_j, and sum_j p_j dx_j = dQ_J = 0. The step is plain + t along; t closes the gap.
        gradient_J = mass_J * log_ratio_J
        gap = kl - self._kl(log_ratio_J) - float(gradient_J @ plain_J)
        with np.errstate(divide="ignore", invalid="ignore"):
            step_beta = float(np.float64(gap) / (gradient_J @ along_J))
        return plain_J + step_beta * along_J, step_beta
