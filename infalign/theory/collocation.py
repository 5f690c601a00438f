"""The coupled equations of an optimum, discretised: Q' = e^L, L' = g(u) g(Q)/beta, Q(0) = 0, Q(1) = 1.

Q is the policy's CDF and L its log-density in base quantiles u. Collocation is fourth order (Lobatto IIIA, as in
scipy's solve_bvp) on a mesh that follows the solution; each Newton step is one banded solve, bordered with the KL when
the KL is given. g and beta enter through their logarithms only: near Worst-of-N beta is as small as e^{-N KL}.
"""

# scipy ships no type stubs: what it returns is unknown to pyright.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from infalign.theory.mesh import FAINTEST, State, monotone_cubic
from infalign.theory.procedures import Procedure

Floats = NDArray[np.float64]

MOST_STEPS = 30
LOOSE = 0.2


@dataclass(frozen=True)
class _Step:
    """A full Newton step in Q, L (nodes) and log beta."""

    cdf: Floats
    log_q: Floats
    log_beta: float


@dataclass(frozen=True)
class _Mesh:
    """What a Newton iteration needs of its mesh: log g(u) at nodes and cell middles, and cell widths."""

    log_g: Floats
    log_g_middle: Floats
    widths: Floats


class Collocation:
    """The discretised equations of one procedure.

    Where g is non-increasing all is turned round: u stands for 1-u, Q for 1-Q, g for its mirror, and L falls along u
    (`sign` -1), so that the small 1-Q which matter there keep their relative accuracy.
    """

    def __init__(self, procedure: Procedure) -> None:
        self.monotone = procedure.monotone
        self.turned = procedure.monotone == "decreasing"
        self.procedure = procedure.mirror if self.turned else procedure
        self.sign = -1.0 if self.turned else 1.0

    def pull(self, log_g: Floats, cdf: Floats, log_beta: float) -> tuple[Floats, Floats]:
        """L' = g(u) g(Q)/beta, at most e^600, and its derivative in Q, given log g(u)."""
        log_g_cdf, steep = self.procedure.log_density(np.clip(cdf, FAINTEST, 1.0))
        pull = self.sign * np.exp(np.minimum(log_g + log_g_cdf - log_beta, 600.0))
        return pull, pull * steep

    def log_reward_slope(self, state: State) -> Floats:
        """log(g(u) g(Q)) at the nodes."""
        return self.log_g(state.u, state.top) + self.procedure.log_density(np.clip(state.cdf, FAINTEST, 1.0))[0]

    def log_g(self, u: Floats, top: Floats) -> Floats:
        """log g(u), from 1 - u near u = 1 where g may vanish there."""
        log_g = self.procedure.log_density(u)[0]
        if self.monotone == "neither":
            log_g = np.where(top < 0.1, self.procedure.mirror.log_density(top)[0], log_g)
        return log_g

    def newton(self, state: State, kl: float | None, tolerance: float = 1e-3, steps: int = MOST_STEPS) -> State | None:
        """At most `steps` Newton steps, damped to 1.5 in L where q is seen; None when they do not converge.

        A guess that has lost its policy may still in L while log beta runs away: that is no convergence.
        """
        mesh = _Mesh(
            self.log_g(state.u, state.top),
            self.log_g(*_middles(state)),
            state.widths,
        )
        floor = -40.0 if self.turned else math.log(FAINTEST)
        for _ in range(steps):
            with np.errstate(over="ignore", invalid="ignore"):
                step = self._step(state, mesh, kl)
            seen = np.maximum(state.log_q, state.log_q + step.log_q) > floor
            size = float(np.abs(step.log_q[seen] / (1 + LOOSE * np.abs(state.log_q[seen]))).max(initial=0.0))
            if not math.isfinite(size) or not math.isfinite(step.log_beta):
                return None
            damping = min(1.0, 1.5 / size) if size > 0 else 1.0
            state = replace(
                state,
                cdf=state.cdf + damping * step.cdf,
                log_q=state.log_q + damping * step.log_q,
                log_beta=state.log_beta + damping * step.log_beta,
            )
            if size < tolerance and abs(step.log_beta) < 0.5:
                sane = np.isfinite(state.log_q).all() and state.cdf.min() > -1e-6 and state.cdf.max() < 1 + 1e-6
                return state if sane and state.log_q.max() < 600 else None
            if size > 0.5:
                state = projected(state)
        return None

    def _middle(self, state: State, h: Floats, pull: Floats) -> tuple[Floats, Floats]:
        """The collocation polynomial's Q and L at the cells' middles, for L' = pull on the nodes.

        L, which falls along u where all is turned, is kept from overflowing where a guess does not know its pull yet.
        """
        q = np.exp(state.log_q)
        cdf = (state.cdf[1:] + state.cdf[:-1]) / 2 - h / 8 * (q[1:] - q[:-1])
        log_q = (state.log_q[1:] + state.log_q[:-1]) / 2 - h / 8 * (pull[1:] - pull[:-1])
        return cdf, np.minimum(log_q, np.maximum(state.log_q[1:], state.log_q[:-1]) + 1.0) if self.turned else log_q

    def _step(self, state: State, mesh: _Mesh, kl: float | None) -> _Step:
        """The full Newton step (0 in log beta unless kl is given)."""
        h, q = mesh.widths, np.exp(state.log_q)
        pull, pull_q = self.pull(mesh.log_g, state.cdf, state.log_beta)
        cdf_m, log_q_m = self._middle(state, h, pull)
        pull_m, pull_mq = self.pull(mesh.log_g_middle, cdf_m, state.log_beta)
        q_m = np.exp(log_q_m)
        right = np.zeros((2 * len(q), 2))
        right[0, 0], right[-1, 0] = -state.cdf[0], 1 - state.cdf[-1]
        right[1:-1:2, 0] = h / 6 * (q[:-1] + 4 * q_m + q[1:]) - np.diff(state.cdf)
        total = h / 6 * (pull[:-1] + 4 * pull_m + pull[1:])
        right[2:-1:2, 0] = total - np.diff(state.log_q)
        # d/d log beta of the residuals, through pull and through the middle's L
        bent = h / 8 * np.diff(pull)
        right[1:-1:2, 1] = h / 6 * 4 * q_m * bent
        right[2:-1:2, 1] = -total
        solution, info = lapack.dgbsv(2, 2, _band(h, (q, q_m), (pull_q, pull_mq)), right)[2:]  # pyright: ignore[reportAttributeAccessIssue]
        if info != 0:
            return _Step(np.full_like(q, np.nan), np.full_like(q, np.nan), math.nan)
        plain, along = solution[:, 0], solution[:, 1]
        if kl is None:
            return _Step(plain[0::2], plain[1::2], 0.0)
        slope, slope_m = q * (state.log_q + 1), q_m * (log_q_m + 1)
        value = h @ (q[:-1] * state.log_q[:-1] + 4 * q_m * log_q_m + q[1:] * state.log_q[1:]) / 6

        def change(step: Floats) -> float:
            d_l, d_pull = step[1::2], pull_q * step[0::2]
            d_middle = (d_l[1:] + d_l[:-1]) / 2 - h / 8 * np.diff(d_pull)
            return float(h @ (slope[:-1] * d_l[:-1] + 4 * slope_m * d_middle + slope[1:] * d_l[1:])) / 6

        down = change(along) + float(h @ (4 * slope_m * bent)) / 6
        step_beta = (kl - float(value) - change(plain)) / down if down != 0 else math.nan
        step = plain + step_beta * along
        return _Step(step[0::2], step[1::2], step_beta)

    def kl(self, state: State) -> float:
        """KL in nats by Simpson's rule on the mesh, as Newton's bordering has it."""
        pull, _ = self.pull(self.log_g(state.u, state.top), state.cdf, state.log_beta)
        h, q = state.widths, np.exp(state.log_q)
        _, log_q_m = self._middle(state, h, pull)
        terms = q * state.log_q
        return float(h @ (terms[:-1] + 4 * np.exp(log_q_m) * log_q_m + terms[1:])) / 6

    def win_rate(self, state: State) -> float:
        """Win rate by Simpson's rule on the mesh."""
        pull, _ = self.pull(self.log_g(state.u, state.top), state.cdf, state.log_beta)
        cdf_m, _ = self._middle(state, state.widths, pull)
        lost = np.exp(self.log_g(state.u, state.top)) * self.procedure.cdf(np.clip(state.cdf, 0, 1))
        lost_m = np.exp(self.log_g(*_middles(state))) * self.procedure.cdf(np.clip(cdf_m, 0, 1))
        share = float(state.widths @ (lost[:-1] + 4 * lost_m + lost[1:])) / 6
        return min(share, 1.0) if self.turned else 1.0 - max(share, 0.0)

    def log_lost(self, state: State) -> float:
        """log(1 - W) where 1 - W may underflow: by the trapezoid rule, with G(Q) ~ Q g/(1 + Q g'/g) where tiny."""
        cdf = np.clip(state.cdf, FAINTEST, 1.0)
        log_g, steep = self.procedure.log_density(cdf)
        with np.errstate(divide="ignore"):
            tail = log_g + np.log(cdf) - np.log(np.maximum(1 + cdf * steep, 1.0))
            decoded = self.procedure.cdf(cdf)
            log_decoded = np.where(decoded > 1e-290, np.log(decoded), tail)
            terms = self.log_g(state.u, state.top) + log_decoded
            terms = np.maximum(terms[1:], terms[:-1]) + np.log(state.widths)
        return float(np.logaddexp.reduce(terms))

    def remeshed(self, state: State, size: int) -> State:
        """The state on `size` cells that share evenly what u, Q, G(u), G(Q), the pull and L (where seen) change by."""
        h, cdf = state.widths, np.clip(state.cdf, FAINTEST, 1.0)
        log_g, (log_g_cdf, steep) = (
            self.log_g(state.u, state.top),
            self.procedure.log_density(np.clip(cdf, FAINTEST, 1.0)),
        )
        level = np.maximum(state.log_q, -40.0)
        elastic = 0.0 if self.turned else np.clip(cdf * np.abs(steep), 0, 1)
        felt = np.where(state.log_q > -40, 1.0, elastic)
        rise = float((np.abs(np.diff(state.log_q)) * np.minimum(felt[1:], felt[:-1])).sum())
        size = int(min(size * (1 + max(rise - 40, 0) / 40), max(size, 5000), 4 * size))
        change = h + np.abs(np.diff(cdf)) + 0.1 * np.abs(np.diff(state.log_q)) * np.minimum(felt[1:], felt[:-1])
        change = change + 0.1 * np.abs(np.diff(np.log1p(np.abs(state.log_q))))
        for log_shape, width in ((log_g, h), (log_g_cdf, np.abs(np.diff(cdf))), (log_g + log_g_cdf, h)):
            shape = np.exp(log_shape - log_shape.max())
            rate = shape / max(float(width @ np.maximum(shape[1:], shape[:-1])), 1e-300)
            change = change + width * (rate[1:] + rate[:-1]) / 3 + 0.2 * np.abs(np.diff(shape))
        with np.errstate(over="ignore", invalid="ignore"):
            pull, _ = self.pull(log_g, state.cdf, state.log_beta)
        strength = np.tanh((log_g + log_g_cdf - state.log_beta - 1.0).clip(-60, 60) / 4)
        change = change + 0.6 * np.abs(np.diff(strength)) * np.exp(
            np.minimum(level[1:], level[:-1]).clip(-40, 0) / 8 * (felt[1:] < 1)
        )
        change = np.convolve(np.pad(change, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid") + 1e-6
        total = np.append(0.0, np.cumsum(change))
        wanted = np.linspace(0.0, total[-1], size + 1)[1:-1]
        cell = np.clip(np.searchsorted(total, wanted, side="right") - 1, 0, len(change) - 1)
        part = (wanted - total[cell]) / change[cell]
        width = h[cell]
        low, u, top = state.u[cell + 1] < 0.5, state.u[cell] + part * width, state.top[cell + 1] + (1 - part) * width
        u, top = np.where(low, u, 1 - top), np.where(low, 1 - u, top)
        new_cdf = monotone_cubic(state.cdf, np.exp(state.log_q), cell, part, width)
        log_q = monotone_cubic(state.log_q, pull, cell, part, width)
        ends = [np.array([0.0, 1.0]), np.array([1.0, 0.0]), state.cdf[[0, -1]], state.log_q[[0, -1]]]
        columns = [
            np.concatenate([end[:1], inner, end[1:]]) for end, inner in zip(ends, (u, top, new_cdf, log_q), strict=True)
        ]
        return State(columns[0], columns[1], columns[2], columns[3], state.log_beta)


def projected(state: State) -> State:
    """The policy of the state's L, normalised, with Q its own CDF (L taken as linear within cells)."""
    level = state.log_q - state.log_q.max()
    q, rise = np.exp(level), np.diff(level)
    steep = np.abs(rise) > 1e-3
    mean = np.where(steep, np.diff(q) / np.where(steep, rise, 1.0), (q[1:] + q[:-1]) / 2)
    cdf = np.append(0.0, np.cumsum(state.widths * mean))
    return replace(state, cdf=cdf / cdf[-1], log_q=level - math.log(cdf[-1]))


def _middles(state: State) -> tuple[Floats, Floats]:
    """u and 1 - u at the cells' middles, each accurate relative to itself."""
    h = state.widths / 2
    low, u, top = state.u[1:] < 0.5, state.u[:-1] + h, state.top[1:] + h
    return np.where(low, u, 1 - top), np.where(low, 1 - u, top)


def _band(h: Floats, q: tuple[Floats, Floats], slope: tuple[Floats, Floats]) -> Floats:
    """The Jacobian in LAPACK's band storage: unknowns Q_0, L_0, Q_1, ...; rows Q_0, then two per cell, then Q_n.

    With f = (e^L, pull(Q)) and middle m = (y0+y1)/2 - h/8 (f1-f0), a cell's rows are y1-y0 - h/6 (f0+4 f_m+f1).
    """
    (q_node, q_m), (p_node, p_m) = q, slope
    n = 2 * len(q_node)
    band = np.zeros((7, n))

    def put(row: int, column: int, values: Floats) -> None:
        """Entries (row + 2i, column + 2i) of the matrix."""
        band[4 + row - column, column : column + 2 * len(h) : 2] = values

    a = 2 * h / 3
    for side, sign in ((0, -1.0), (1, 1.0)):
        q_s, p_s = q_node[side : len(h) + side], p_node[side : len(h) + side]
        put(1, 2 * side, sign + a * q_m * (sign * h / 8) * p_s)
        put(1, 2 * side + 1, -h / 6 * q_s - a * q_m / 2)
        put(2, 2 * side, -h / 6 * p_s - a * p_m / 2)
        put(2, 2 * side + 1, sign + a * p_m * (sign * h / 8) * q_s)
    band[4, 0] = 1.0
    band[4 + 1, n - 2] = 1.0
    return band
