"""Optimal policies and win rates when rewards tie: J levels of base mass b_j and policy mass p_j, ascending.

With P, Q the cumulative masses, level j of the decoded policy gets G(Q_j) - G(Q_{j-1}), so
W = 1 - 1/2 sum_j [G(P_j) - G(P_{j-1})] [G(Q_j) + G(Q_{j-1})]. Every optimum at a KL (or beta) satisfies
log(p_{j+1}/b_{j+1}) - log(p_j/b_j) = g(Q_j) [G(P_{j+1}) - G(P_{j-1})] / (2 beta): a tridiagonal system, solved by
Newton steps bordered with the KL. It is unique when g is non-decreasing; otherwise the best of several starts is kept.
A coarse reward can be far from the continuous limit: binary p = .5 with Best-of-4 never exceeds .531.

Theory: derived in our notes from InfAlign's definitions (arXiv:2412.19792).
"""

# scipy ships no type stubs: what it returns is unknown to pyright.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import lapack

from infalign.theory.procedures import Procedure, check_procedure
from infalign.theory.tilted import one_of
from infalign.types import InputError

Floats = NDArray[np.float64]

_MOST_STEPS = 60
_SUP_SLACK = 1e-9


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
    blocks = _Blocks(procedure, base_J[kept_J])
    best = blocks.at_kl(kl) if kl is not None else blocks.at_beta(beta or 0.0)
    masses_J = np.zeros_like(base_J)
    masses_J[kept_J] = best.policy_masses_J
    return TiedPolicy(masses_J, best.beta, best.kl, best.win_rate)


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


def _masses(name: str, masses: ArrayLike) -> Floats:
    """The masses as floats that sum to 1 exactly enough; InputError otherwise."""
    masses_J = np.asarray(masses, dtype=float)
    if masses_J.ndim != 1 or masses_J.size == 0 or not np.all(masses_J >= 0) or not abs(masses_J.sum() - 1) <= 1e-6:
        raise InputError(f"{name} must be non-negative and sum to 1; got {masses!r}")
    return masses_J / masses_J.sum()


def _cumulative(masses_J: Floats) -> Floats:
    """0, P_1, ..., P_J = 1: (J+1,)."""
    total = np.minimum(np.concatenate([[0.0], np.cumsum(masses_J)]), 1.0)
    total[-1] = 1.0
    return total


def _win_rate(procedure: Procedure, base_J: Floats, policy_J: Floats) -> float:
    """The equation of the module's first paragraph."""
    decoded_base = procedure.cdf(_cumulative(base_J))
    decoded = procedure.cdf(_cumulative(policy_J))
    return 1.0 - 0.5 * float(np.diff(decoded_base) @ (decoded[1:] + decoded[:-1]))


class _Blocks:
    """The tie-block problem of one prompt: base masses (J,), all positive, and c_j = [G(P_{j+1}) - G(P_{j-1})]/2."""

    def __init__(self, procedure: Procedure, base_J: Floats) -> None:
        self.procedure, self.base_J = procedure, base_J
        self.log_base_J = np.log(base_J)
        self.from_top = procedure.monotone == "decreasing"
        self.below_J = _cumulative(base_J)
        decoded, undecoded = procedure.cdf(self.below_J), procedure.mirror.cdf(_cumulative(base_J[::-1])[::-1])
        low, high = decoded[2:] - decoded[:-2], undecoded[:-2] - undecoded[2:]
        self.coupling = np.where(decoded[1:-1] < 0.5, low, high) / 2
        self.most_kl = -float(self.log_base_J[-1])

    def at_kl(self, kl: float) -> TiedPolicy:
        """The best policy found within kl."""
        if kl >= self.most_kl - _SUP_SLACK:
            return self._top()
        found = [self._from_start(shape, kl) for shape in self._starts()]
        return max(found, key=lambda policy: policy.win_rate)

    def at_beta(self, beta: float) -> TiedPolicy:
        """The best W - beta KL: a scan over KL, then Newton at fixed beta from the best."""
        uniform = TiedPolicy(self.base_J, beta, 0.0, 0.5)
        if len(self.base_J) == 1:
            return uniform
        grid = self.most_kl * np.concatenate([10.0 ** np.arange(-6, -1), np.linspace(0.02, 0.98, 49), [0.995, 1.0]])
        grid = grid[grid > _SUP_SLACK]
        found = [uniform, *(self.at_kl(float(kl)) for kl in grid)]
        scanned = max(found, key=lambda policy: policy.win_rate - beta * policy.kl)
        with np.errstate(divide="ignore"):
            start = np.maximum(np.log(scanned.policy_masses_J) - self.log_base_J, -50.0)
        polished = self._newton(start, math.log(beta), None)
        if polished is None or polished.win_rate - beta * polished.kl < scanned.win_rate - beta * scanned.kl:
            return TiedPolicy(scanned.policy_masses_J, beta, scanned.kl, scanned.win_rate)
        return polished

    def _top(self) -> TiedPolicy:
        """All mass on the top level: the limit beta -> 0 of every procedure."""
        top_J = np.zeros_like(self.base_J)
        top_J[-1] = 1.0
        return TiedPolicy(top_J, 0.0, self.most_kl, _win_rate(self.procedure, self.base_J, top_J))

    def _starts(self) -> list[Floats]:
        """Rewards (J,) to start from: the gradient at the base and, where optima may be many, at other policies."""
        p = self.below_J[1:-1]
        at = [p] if self.procedure.monotone in ("increasing", "constant") else [p, p**4, 1 - (1 - p) ** 4]
        return [self._reward(self.procedure.density(Q)) for Q in at]

    def _reward(self, density: Floats) -> Floats:
        """The levels' rewards R_j - R_J <= 0 (J,) for g at the policy's cumulative masses (J-1,)."""
        return np.concatenate([-np.cumsum((self.coupling * density)[::-1])[::-1], [0.0]])

    def _decoded(self, mass_J: Floats) -> tuple[Floats, Floats]:
        """g and g' at Q_1..Q_{J-1}; from the top down where g lives on 1-Q, to keep its relative accuracy."""
        if self.from_top:
            above = np.minimum(np.cumsum(mass_J[:0:-1])[::-1], 1.0)
            return self.procedure.mirror.density(above), -self.procedure.mirror.slope(above)
        below = np.minimum(np.cumsum(mass_J)[:-1], 1.0)
        return self.procedure.density(below), self.procedure.slope(below)

    def _from_start(self, reward_J: Floats, kl: float) -> TiedPolicy:
        """Newton from the tilt of reward_J at kl; if that fails, along a path of growing KL; else the tilt itself."""
        log_ratio_J, log_beta = self._tilted(reward_J, kl)
        if self.procedure.monotone != "increasing":
            for _ in range(3):
                density, _ = self._decoded(self.base_J * np.exp(log_ratio_J))
                log_ratio_J, log_beta = self._tilted(self._reward(density), kl)
        log_beta = self._fitting_log_beta(log_ratio_J, log_beta)
        found = self._newton(log_ratio_J, log_beta, kl) or self._along_path(kl)
        return found or self._policy(log_ratio_J, log_beta)

    def _along_path(self, kl: float) -> TiedPolicy | None:
        """Newton at a growing sequence of KLs, each started from the last; steps shrink where it fails."""
        reached, step = 0.0, kl / 8
        log_ratio_J, log_beta = self._tilted(self._starts()[0], min(step, 0.01))
        while reached < kl and step > kl / 256:
            target = min(reached + step, kl)
            found = self._newton(log_ratio_J, log_beta, target)
            if found is None:
                step /= 2
                continue
            reached, log_beta = target, math.log(found.beta)
            log_ratio_J = np.log(np.maximum(found.policy_masses_J, 1e-300)) - self.log_base_J
            if reached == kl:
                return found
        return None

    def _tilted(self, reward_J: Floats, kl: float) -> tuple[Floats, float]:
        """log(p/b) (J,) and log beta of p ~ b e^{R/beta} with the given KL, by safeguarded Newton in log(1/beta)."""
        spread = math.sqrt(float(self.base_J @ (reward_J - self.base_J @ reward_J) ** 2))
        x, low, high = 0.5 * math.log(2 * kl) - math.log(max(spread, 1e-300)), -math.inf, math.inf
        log_ratio_J, leap = np.zeros_like(reward_J), 2.0
        for _ in range(100):
            tilt_J = np.maximum(reward_J * math.exp(min(x, 600.0)), -1e4)
            mass_J = self.base_J * np.exp(tilt_J)
            total = float(mass_J.sum())
            log_ratio_J, mass_J = tilt_J - math.log(total), mass_J / total
            mean = float(mass_J @ tilt_J)
            value, slope = mean - math.log(total), float(mass_J @ (tilt_J - mean) ** 2)
            low, high = (x, high) if value < kl else (low, x)
            if abs(value - kl) < 1e-9 * kl:
                break
            new = x + math.log(kl / value) * value / slope if slope > 0 and value > 0 else math.inf
            if not (low < new < high and abs(new - x) < leap):
                new = (low + high) / 2 if high - low < 1e9 else x + math.copysign(leap, kl - value)
                leap *= 2
            x = new
        return log_ratio_J, -x

    def _fitting_log_beta(self, log_ratio_J: Floats, log_beta: float) -> float:
        """The log beta at which a policy's steps fit its own gradient on average (log_beta where it has none)."""
        mass_J = self.base_J * np.exp(log_ratio_J)
        below = np.cumsum(mass_J)[:-1]
        weight = np.minimum(below, 1 - below)
        pull, steps = weight @ (self.coupling * self._decoded(mass_J)[0]), weight @ np.diff(log_ratio_J)
        return math.log(pull / steps) if pull > 0 and steps > 0 else log_beta

    def _policy(self, log_ratio_J: Floats, log_beta: float) -> TiedPolicy:
        """The policy with its KL and win rate."""
        mass_J = self.base_J * np.exp(log_ratio_J)
        kl = float(mass_J @ log_ratio_J)
        return TiedPolicy(mass_J, math.exp(log_beta), kl, _win_rate(self.procedure, self.base_J, mass_J))

    def _newton(self, log_ratio_J: Floats, log_beta: float, kl: float | None) -> TiedPolicy | None:
        """Newton on log(p/b) and, for a given kl, log beta; None when it does not converge."""
        for _ in range(_MOST_STEPS):
            step_J, step_beta = self._newton_step(log_ratio_J, log_beta, kl)
            new_J = log_ratio_J + step_J
            seen_J = np.maximum(new_J, log_ratio_J) > -40
            size = max(float(np.abs(step_J[seen_J]).max(initial=0.0)), abs(step_beta))
            if not math.isfinite(size) or abs(log_beta) > 600:
                return None
            damping = min(1.0, 1.5 / size) if size > 0 else 1.0
            log_ratio_J, log_beta = log_ratio_J + damping * step_J, log_beta + damping * step_beta
            peak = float(log_ratio_J.max())
            log_ratio_J = log_ratio_J - peak - math.log(float(self.base_J @ np.exp(log_ratio_J - peak)))
            if size < 1e-7:
                return self._policy(log_ratio_J, log_beta)
        return None

    def _newton_step(self, log_ratio_J: Floats, log_beta: float, kl: float | None) -> tuple[Floats, float]:
        """The full Newton step: unknowns interleave as log-ratio_1, Q_1, log-ratio_2, ..., a tridiagonal matrix."""
        mass_J = self.base_J * np.exp(log_ratio_J)
        coupling = self.coupling * math.exp(-log_beta)
        density, slope = self._decoded(mass_J)
        pull = coupling * density
        size = 2 * len(mass_J) - 1
        sub, diagonal, sup = -np.ones(size - 1), np.empty(size), np.ones(size - 1)
        diagonal[0::2], diagonal[1::2] = -mass_J, -coupling * slope
        right = np.zeros((size, 2))
        right[1::2, 0], right[1::2, 1] = pull - np.diff(log_ratio_J), -pull
        solution, info = lapack.dgtsv(sub, diagonal, sup, right)[3:]  # pyright: ignore[reportAttributeAccessIssue]
        if info != 0:
            return np.full_like(mass_J, np.nan), math.nan
        plain_J, along_J = solution[0::2, 0], solution[0::2, 1]
        if kl is None:
            return plain_J, 0.0
        gradient_J = mass_J * (log_ratio_J + 1)
        gap = kl - float(mass_J @ log_ratio_J) - float(gradient_J @ plain_J)
        with np.errstate(divide="ignore", invalid="ignore"):
            step_beta = float(np.float64(gap) / (gradient_J @ along_J))
        return plain_J + step_beta * along_J, step_beta
