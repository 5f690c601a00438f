"""k-th of n at a large KL: the optimum continued in logs (`logarithmic`) from where its Q becomes tiny below a layer.

Near the worst rank r the policy avoids all u below a layer at about 1 - e^{-KL}. When the KL grows by `rise` the layer
moves by it in x = -log(1-u), while V = log Q and L = log q at a fixed u well below it shift by a constant. Both hold in
the zone between, so that the two together are a guess close enough to double the KL in one step.

Theory: derived in our notes (section 3) from InfAlign's coupled equations (arXiv:2412.19792).
"""

# scipy ships no type stubs: what it returns is unknown to pyright.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import interpolate

from infalign.theory.frontier import Solution, from_nodes
from infalign.theory.logarithmic import Deep, LogCollocation
from infalign.theory.mesh import State

Floats = NDArray[np.float64]

BOTTOM, TOP = -24.0, 36.0
COARSE, FINE = 600, 4000
SHALLOWEST = 0.1
REACH = 0.6


def is_deep(state: State, rank: int, n: int) -> bool:
    """Is rank r's Q below e^-8 r/n up to u = 0.1: is there a quasi-steady zone?"""
    return float(np.interp(-math.expm1(-SHALLOWEST), state.u, state.cdf)) < rank / n * math.exp(-8.0)


def solve_deep(solver: LogCollocation, state: State, reached: float, kl: float) -> Solution | None:
    """The optimum at a KL, continued from one that `is_deep` and has KL `reached` <= kl; None where Newton fails."""
    found = solver.newton(solver.remeshed(_in_logs(state), COARSE), reached, 1e-3)
    reach = REACH
    while found is not None and reached < kl:
        rise = min(reach * _layer(solver, found), kl - reached)
        close = solver.newton(_moved(solver, found, rise), reached + rise, 1e-3)
        if close is not None:
            found, reached = solver.remeshed(close, COARSE), reached + rise
        elif reach < 0.02:
            return None
        else:
            reach /= 2
    for size, tolerance in ((FINE // 2, 1e-3), (FINE, 1e-8)):
        found = None if found is None else solver.newton(solver.remeshed(found, size), kl, tolerance)
    return None if found is None else _solution(solver, found)


def _in_logs(state: State) -> Deep:
    """A policy on a mesh of u, in logs, continued to BOTTOM and TOP."""
    inside = (state.u > 1e-10) & (state.top > 1e-12) & (state.cdf > 1e-290) & (state.cdf < 1 - 1e-12)
    t = np.log(state.u[inside]) - np.log(state.top[inside])
    log_cdf, log_q = np.log(state.cdf[inside]), state.log_q[inside]
    low, high = np.arange(BOTTOM, t[0] - 0.2, 0.5), np.arange(t[-1] + 0.3, TOP + 0.1, 0.5)
    return Deep(
        np.concatenate([low, t, high]),
        np.concatenate([log_cdf[0] + low - t[0], log_cdf, -np.exp(np.minimum(log_q[-1] - high, 0.0))]),
        np.concatenate([np.full_like(low, log_q[0]), log_q, np.full_like(high, log_q[-1])]),
        state.log_beta,
    )


def _layer(solver: LogCollocation, state: Deep) -> float:
    """Where the layer begins, in x = -log(1-u): below it Q is too small for 1 - Q to be felt."""
    return float(np.interp(math.log(solver.rank / solver.n) - 8.0, state.log_cdf, np.logaddexp(0, state.t)))


def _moved(solver: LogCollocation, state: Deep, rise: float) -> Deep:
    """A guess at KL + rise: the policy moved up by `rise` in x from well below the layer on, shifted beneath."""
    x = np.logaddexp(0, state.t)
    first = int(np.searchsorted(x, (1 - REACH) * _layer(solver, state)))
    place = x[first:] + rise
    place = place + np.log(-np.expm1(-place))
    below = state.t < 2 * place[0] - place[1]
    rate = solver.rates(state.t, np.stack([state.log_cdf, state.log_q]), state.log_beta)[0][0]
    there = float(interpolate.CubicHermiteSpline(state.t, state.log_cdf, rate)(place[0]))
    shift = state.log_cdf[first] - there
    seen = int(np.searchsorted(state.log_cdf, -math.log(solver.n) - 1))
    old, new = (np.array([t, -t]) for t in (state.t[seen], place[seen - first]))
    climb = solver.log_g(*-np.logaddexp(0, -new)) - solver.log_g(*-np.logaddexp(0, -old))
    return Deep(
        np.concatenate([state.t[below], place]),
        np.concatenate([state.log_cdf[below] + shift, state.log_cdf[first:]]),
        np.concatenate([state.log_q[below] + shift, state.log_q[first:] + rise]),
        state.log_beta + float(climb) - rise,
    )


def _solution(solver: LogCollocation, state: Deep) -> Solution:
    """The curves, with the measures, of a converged state."""
    t, n, rank = state.t[::-1], solver.n, solver.rank
    y = np.stack([state.log_cdf, state.log_q])[:, ::-1]
    rates, steep = solver.rates(t, y, state.log_beta)
    u, top = np.exp(-np.logaddexp(0, -t)), np.exp(-np.logaddexp(0, t))
    pull = rates[1] / (u * top)
    bend = pull * ((rank - 1) / u - (n - rank) / top + steep * rates[0] / (u * top))
    ends = np.array([[0.0, y[1, 0], 0.0, 0.0, 1.0], [1.0, y[1, -1], 0.0, 0.0, 0.0]])
    nodes = np.vstack([ends[:1], np.stack([top, y[1], pull, bend, np.exp(y[0])], axis=1)[top < 1.0], ends[1:]])
    return from_nodes(state.log_beta, solver.kl(state), -math.expm1(solver.log_lost(state)), nodes.T)
