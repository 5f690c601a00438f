"""Best-of-N and Worst-of-N exactly: all optima of all beta are pieces of ONE curve per N.

R'' = +-(y R)^{N-1} R', R(0) = 0, R'(0) = 1, has a scaling symmetry. In w = y^N R^{N-1} and v = y R'/R it becomes
dv/d(log w) = v (1 +- w - v)/(N + (N-1) v), v -> 1 as w -> 0, and the optimum at beta is the piece up to
w = N^2/beta: no root find in beta at all, and one in log w for a given KL. With q the optimal policy,
v at the end is q(1) (Best) or q(0) (Worst), W = (beta/N)(q(1)-1) or 1-(beta/N)(1-q(0)), and
KL = log(1+N W/beta) - (N/beta)(1-W) or N W/beta + log q(0).
Best is carried as d = 1 - W, v = 1 + w (1-d)/N, Worst as lam = log v + w/N, so that nothing cancels or overflows.

Theory: derived in our notes (section 3) from InfAlign's coupled equations (arXiv:2412.19792).
"""

# scipy ships no type stubs: what it returns is unknown to pyright.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import integrate, interpolate, optimize

from infalign.theory.hermite import Curve
from infalign.types import InputError

Floats = NDArray[np.float64]

START = float(np.log(1e-14))
SPACING = 0.01


@dataclass(frozen=True)
class Solution:
    """An optimum as curves on [0, 1]: `phi` (0 at u = 0), `log_density` of q (floored at -1e4) and `cdf` Q."""

    log_beta: float
    kl: float
    win_rate: float
    phi: Curve
    log_density: Curve
    cdf: Curve


def from_nodes(log_beta: float, kl: float, win_rate: float, nodes: Floats) -> Solution:
    """The curves through rows 1 - u (not descending), log q, (log q)', (log q)'' and Q: (5, Q), derivatives in u."""
    top, log_q, pull, bend, cdf = nodes[:, np.append(True, np.diff(nodes[0]) > 0)]
    beta, q, seen = math.exp(log_beta) if log_beta > -745 else 0.0, np.exp(log_q), log_q > -1e4
    return Solution(
        log_beta,
        kl,
        win_rate,
        Curve(top, beta * (log_q - log_q[-1]), -beta * pull, beta * bend, True),
        Curve(top, np.maximum(log_q, -1e4), np.where(seen, -pull, 0.0), np.where(seen, bend, 0.0), True),
        Curve(top, cdf, -q, q * pull, True),
    )


@dataclass(frozen=True)
class Frontier:
    """The curve of one N >= 2 (`worst` or best) on even nodes in log w, up to `last`.

    Beyond `last` a Worst-of-N curve continues exactly (v = 0 to rounding): lam rises by 1/N per unit, R stays.
    """

    n: int
    worst: bool
    last: float
    spline: interpolate.CubicHermiteSpline

    def states(self, log_w: Floats) -> Floats:
        """Columns (d or lam, log R, log R' (Worst: + w/N)) at log_w (any shape): (..., 3)."""
        inside = self.spline(np.minimum(log_w, self.last))
        if self.worst:
            beyond = np.maximum(log_w - self.last, 0.0)
            inside[..., 0] += beyond / self.n
        return inside

    def win_rate(self, log_w: float) -> float:
        """W at the optimum that ends at log_w."""
        first = float(self.states(np.array(log_w))[0])
        if not self.worst:
            return 1.0 - first
        return 1.0 + self.n * math.exp(-min(log_w, 700.0)) * math.expm1(first - math.exp(min(log_w, 700.0)) / self.n)

    def kl(self, log_w: float) -> float:
        """KL in nats at the optimum that ends at log_w."""
        first = float(self.states(np.array(log_w))[0])
        w = math.exp(min(log_w, 700.0))
        if self.worst:
            return first + math.expm1(first - w / self.n)
        return math.log1p(w * (1 - first) / self.n) - w / self.n * first

    def log_w_at_kl(self, kl: float) -> float:
        """The end of the optimum with the given KL, which increases along the curve."""
        high = self.last
        while self.worst and self.kl(high) < kl:
            high += 10.0 + self.n * kl

        def excess(log_w: float) -> float:
            return math.log(max(self.kl(log_w), 1e-300) / kl)

        return float(optimize.brentq(excess, -12.0, high, xtol=1e-13))  # pyright: ignore[reportArgumentType]


def solve_extreme(n: int, worst: bool, log_beta: float | None, kl: float | None) -> Solution:
    """The optimum of Best-of-n or Worst-of-n (n >= 2) at log beta or at a KL in nats (exactly one given)."""
    last = math.log(800.0 * n) if worst else 30.0  # a Worst-of-N curve is exact beyond; a Best-of-N curve is extended
    end = math.inf if log_beta is None else 2 * math.log(n) - log_beta
    frontier = _frontier(n, worst, last)
    while not worst and last < 600 and (frontier.kl(last) < kl if kl is not None else last < end):
        last *= 2
        frontier = _frontier(n, worst, last)
    if kl is not None:
        if not worst and frontier.kl(last) < kl:
            raise InputError(f"BestOfN({n}) reaches no KL of {kl:g} nats before beta underflows; lower kl")
        end = frontier.log_w_at_kl(kl)
    return _solution(frontier, end)


@lru_cache(maxsize=64)
def _frontier(n: int, worst: bool, last: float) -> Frontier:
    """Integrate the curve from w = 1e-14, where v - 1 is linear in w."""

    def rates(log_w: float, state: Floats) -> tuple[Floats, Floats, Floats]:
        w = math.exp(log_w)
        return _rates(n, worst, w, state[0], math.exp(state[0] - w / n) if worst else 1 + w * (1 - state[0]) / n)

    nodes = np.append(np.arange(START, last - SPACING / 2, SPACING), last)
    w = math.exp(START)
    start = [w / (2 * n), START / (2 * n - 1), w * (n - 1) / (n * (2 * n - 1))]
    if not worst:
        start = [0.5, START / (2 * n - 1), w / (2 * n - 1)]
    flow = integrate.solve_ivp(
        rates,
        (START, last),
        start,
        method="DOP853",
        rtol=1e-12,
        atol=[1e-15 if worst else 1e-30, 1e-15, 1e-15],
        t_eval=nodes,
        max_step=0.25,
    )
    assert flow.success, flow.message
    w, first = np.exp(nodes), flow.y[0]
    slopes = _rates(n, worst, w, first, np.exp(first - w / n) if worst else 1 + w * (1 - first) / n)
    return Frontier(n, worst, last, interpolate.CubicHermiteSpline(nodes, flow.y.T, np.stack(slopes, axis=1)))


def _rates(n: int, worst: bool, w: Any, first: Any, v: Any) -> tuple[Any, Any, Any]:
    """d/d(log w) of the three states of `Frontier.states`, for floats or arrays."""
    slow = n + (n - 1) * v
    if worst:
        return (n * (1 - v) + (n - 1) * w * v) / (n * slow), v / slow, (n - 1) * w * v / (n * slow)
    return n * (1 - first - first * v) / slow, v / slow, w / slow


def _nodes(frontier: Frontier, end: float) -> Floats:
    """log w, ascending, dense wherever q or Phi moves: up to w = 1e4 N, and on the last 35 units."""
    fine = 5 * SPACING
    rising = np.arange(START, min(end, frontier.last + 3.0 if frontier.worst else end), fine)
    final = np.arange(end, max(end - 35.0, rising[-1] + fine / 2), -fine)[::-1]
    return np.concatenate([rising, final]) if len(final) else np.append(rising[:-1], end)


def _solution(frontier: Frontier, end: float) -> Solution:
    """The optimum that ends at log w = end, on nodes x = y/kappa: u = x for Best, u = 1 - x for Worst."""
    n, log_w = frontier.n, _nodes(frontier, end)
    states = frontier.states(log_w)
    w = np.exp(np.minimum(log_w, 600.0))
    log_beta = 2 * math.log(n) - end
    beta, beta_w = math.exp(max(log_beta, -740.0)), n * n * np.exp(log_w - end)
    log_y = (log_w - (n - 1) * states[:, 1]) / n
    x, share = np.exp(log_y - log_y[-1]), np.exp(states[:, 1] - states[-1, 1])
    log_density = states[:, 2] + log_y[-1] - states[-1, 1]
    phi, v = beta * states[:, 2], 1 + w * (1 - states[:, 0]) / n
    if frontier.worst:
        v = np.exp(states[:, 0] - w / n)
        phi = phi - phi[-1] - n * np.expm1(log_w - end)
        log_density = log_density - w / n
    bend = (n - 1) * beta_w * (1 + v) / x**2
    place = 1 - x if frontier.worst else _from_end(frontier, log_w)
    columns = np.stack([place, share, phi, beta_w / x, bend, log_density, w / x], axis=1)
    flat = np.array([1.0, 0.0, columns[0, 2], 0.0, 0.0, columns[0, 5], 0.0])  # below the first node q is constant
    return _curves(frontier, end, log_beta, np.vstack([flat, columns]).T)


def _from_end(frontier: Frontier, log_w: Floats) -> Floats:
    """1 - y/kappa at ascending log_w, summed from the end by Simpson's rule: accurate relative to itself."""
    n, left, right = frontier.n, log_w[:-1], log_w[1:]
    w = np.exp(np.stack([left, (left + right) / 2, right]))
    v = 1 + w * (1 - frontier.states(np.log(w))[..., 0]) / n
    steps = np.array([1, 4, 1]) @ (1 / (n + (n - 1) * v)) * (right - left) / 6
    return -np.expm1(-np.append(np.cumsum(steps[::-1])[::-1], 0.0))


def _curves(frontier: Frontier, end: float, log_beta: float, columns: Floats) -> Solution:
    """The three curves, from columns place, R(y)/R(kappa), Phi, |Phi'|, |Phi''|, log q, |(log q)'| at ascending y.

    Place is 1 - y/kappa: u for Worst, where Q = 1 - share, and 1 - u for Best.
    """
    columns = columns[:, ::-1]
    gaps = np.diff(columns[0]) > 0
    place, cdf, phi, slope, bend, log_density, steep = columns[:, np.append(True, gaps) & np.append(gaps, True)]
    curved = np.divide(bend * steep, slope, out=np.zeros_like(slope), where=slope > 0)
    seen = log_density > -1e4
    sign = 1.0 if frontier.worst else -1.0
    slope, bend = sign * slope, -sign * bend if frontier.worst else bend
    steep, curved = np.where(seen, sign * steep, 0.0), np.where(seen, -curved if frontier.worst else curved, 0.0)
    if frontier.worst:
        cdf = 1 - cdf
    density = sign * np.exp(log_density)
    top = not frontier.worst
    return Solution(
        log_beta,
        frontier.kl(end),
        frontier.win_rate(end),
        Curve(place, phi, slope, bend, top),
        Curve(place, np.maximum(log_density, -1e4), steep, curved, top),
        Curve(place, cdf, density, density * steep, top),
    )
