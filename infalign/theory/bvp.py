"""The optimum of any procedure: Newton on the boundary-value problem Q' = e^L, L' = g(u) g(Q)/beta, Q(0) = 0, Q(1) = 1.

Q is the policy's CDF and L its log-density in base quantiles u. Collocation is fourth order (Lobatto IIIA, as in
scipy's solve_bvp) on a mesh that follows the solution; each Newton step is one banded solve, bordered with the KL when
the KL is given. From a small KL, where the optimum is nearly the tilt of int g^2, solutions are continued to
growing KL; where optima may be many (g not non-decreasing) other starts compete.

Theory: derived in our notes (section 3) from InfAlign's coupled equations (arXiv:2412.19792).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import lapack

from infalign.theory.frontier import Solution
from infalign.theory.hermite import Curve
from infalign.theory.mesh import State, monotone_cubic, with_beta
from infalign.theory.procedures import Procedure
from infalign.types import InputError

Floats = NDArray[np.float64]

COARSE, FINE = 160, 1600
LOWEST_LOG_BETA = -600.0


def solve_general(procedure: Procedure, log_beta: float | None, kl: float | None) -> Solution:
    """The optimum of any procedure at log beta or at a KL in nats (exactly one given).

    Raises InputError when the KL needs a beta that underflows, or when Newton fails at every step size.
    """
    problem = _Problem(procedure)
    candidates = [problem.continued(log_beta, kl), *problem.restarted(log_beta, kl)]
    best = max((c for c in candidates if c is not None), key=lambda c: problem.objective(c, log_beta), default=None)
    for size in (FINE // 4, FINE):
        best = None if best is None else problem.newton(problem.remeshed(best, size), kl)
    if best is None:
        given = f"kl={kl}" if log_beta is None else f"beta={math.exp(log_beta):g}"
        raise InputError(f"no optimum of {procedure!r} found at {given}: beta underflows; ask for a smaller KL")
    return problem.solution(best)


class _Problem:
    """The boundary-value problem of one procedure.

    A procedure that favours low ranks is turned round: u stands for 1-u, Q for 1-Q, g for its mirror, and L falls
    along u (`sign` -1), so that the small 1-Q which matter there keep their relative accuracy.
    """

    def __init__(self, procedure: Procedure) -> None:
        mean_rank = float(procedure.order_weights(procedure.n) @ np.arange(1, procedure.n + 1))
        self.turned = 2 * mean_rank < procedure.n + 1
        self.procedure = procedure.mirror if self.turned else procedure
        self.sign = -1.0 if self.turned else 1.0
        self.monotone = procedure.monotone

    def objective(self, state: State, log_beta: float | None) -> float:
        """W - beta KL, or W when the KL is given."""
        win_rate, kl = self.measures(state)
        return win_rate - (0.0 if log_beta is None else math.exp(log_beta) * kl)

    def measures(self, state: State) -> tuple[float, float]:
        """Win rate and KL by Simpson's rule on the mesh."""
        middle, q = self._middle(state, self._pull(state.u, state.cdf, state.log_beta)[0]), np.exp(state.log_q)
        q_middle, h = np.exp(middle.log_q), state.widths / 6
        lost, lost_middle = self._lost(state), self._lost(middle)
        kl = h @ (q[:-1] * state.log_q[:-1] + 4 * q_middle * middle.log_q + q[1:] * state.log_q[1:])
        lost_share = float(h @ (lost[:-1] + 4 * lost_middle + lost[1:]))
        return lost_share if self.turned else 1.0 - lost_share, float(kl)

    def _lost(self, state: State) -> Floats:
        """g(u) G(Q) on the nodes."""
        return self.procedure.density(state.u) * self.procedure.cdf(np.clip(state.cdf, 0, 1))

    def _pull(self, u: Floats, cdf: Floats, log_beta: float) -> tuple[Floats, Floats]:
        """L' = g(u) g(Q)/beta and its derivative in Q."""
        cdf = np.clip(cdf, 0.0, 1.0)
        weight = self.sign * self.procedure.density(u) * math.exp(-log_beta)
        return weight * self.procedure.density(cdf), weight * self.procedure.slope(cdf)

    def _middle(self, state: State, pull: Floats) -> State:
        """The collocation polynomial's values at the cells' middles, for L' = pull on the nodes."""
        h, q = state.widths, np.exp(state.log_q)
        cdf = (state.cdf[1:] + state.cdf[:-1]) / 2 - h / 8 * np.diff(q)
        log_q = (state.log_q[1:] + state.log_q[:-1]) / 2 - h / 8 * np.diff(pull)
        u = np.where(state.u[1:] < 0.5, state.u[:-1] + h / 2, 1 - (state.top[1:] + h / 2))
        return State(u, 1 - u, cdf, log_q, state.log_beta)

    def newton(self, state: State, kl: float | None) -> State | None:
        """Newton steps, damped to 1.5 in L where q is seen; None when they do not converge."""
        for _ in range(25):
            with np.errstate(over="ignore", invalid="ignore"):
                step_q, step_l, step_beta = self._step(state, kl)
            seen = np.maximum(state.log_q, state.log_q + step_l) > -40
            size = max(float(np.abs(step_l[seen]).max(initial=0.0)), abs(step_beta))
            damping = min(1.0, 1.5 / size) if size > 0 else 1.0
            if not math.isfinite(size) or abs(state.log_beta + damping * step_beta) > -LOWEST_LOG_BETA:
                return None
            cdf, log_q = state.cdf + damping * step_q, state.log_q + damping * step_l
            state = State(state.u, state.top, cdf, log_q, state.log_beta + damping * step_beta)
            if size < 1e-6:
                sane = np.isfinite(log_q).all() and log_q.max() < 600 and cdf.min() > -1e-6 and cdf.max() < 1 + 1e-6
                return state if sane else None
        return None

    def _step(self, state: State, kl: float | None) -> tuple[Floats, Floats, float]:
        """The full Newton step in Q, L and log beta (0 unless kl is given)."""
        h, q = state.widths, np.exp(state.log_q)
        pull, pull_q = self._pull(state.u, state.cdf, state.log_beta)
        middle = self._middle(state, pull)
        pull_m, pull_mq = self._pull(middle.u, middle.cdf, state.log_beta)
        q_m = np.exp(middle.log_q)
        right = np.zeros((2 * len(state.u), 2))
        right[0, 0], right[-1, 0] = -state.cdf[0], 1 - state.cdf[-1]
        right[1:-1:2, 0] = -(np.diff(state.cdf) - h / 6 * (q[:-1] + 4 * q_m + q[1:]))
        total = h / 6 * (pull[:-1] + 4 * pull_m + pull[1:])
        right[2:-1:2, 0] = -(np.diff(state.log_q) - total)
        # d/d log beta of the residuals, through pull and through the middle's L and Q
        bent = h / 8 * np.diff(pull)
        right[1:-1:2, 1] = h / 6 * 4 * q_m * bent
        right[2:-1:2, 1] = -total
        band = self._band(h, (q, q_m), (pull_q, pull_mq))
        solution, info = lapack.dgbsv(2, 2, band, right)[2:]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
        if info != 0:
            return np.full_like(q, np.nan), np.full_like(q, np.nan), math.nan
        plain, along = solution[:, 0], solution[:, 1]
        step_beta = 0.0
        if kl is not None:
            step_beta = self._bordering((state, middle), (pull, pull_q), plain, along, kl)
        step = plain + step_beta * along
        return step[0::2], step[1::2], step_beta

    @staticmethod
    def _bordering(
        states: tuple[State, State], pulls: tuple[Floats, Floats], plain: Floats, along: Floats, kl: float
    ) -> float:
        """The step in log beta that meets the KL to first order; KL by Simpson's rule, as in `measures`."""
        (state, middle), (pull, pull_q) = states, pulls
        h, q, q_m = state.widths, np.exp(state.log_q), np.exp(middle.log_q)
        value = h @ (q[:-1] * state.log_q[:-1] + 4 * q_m * middle.log_q + q[1:] * state.log_q[1:]) / 6
        slope, slope_m = q * (state.log_q + 1), q_m * (middle.log_q + 1)

        def change(step: Floats, bent: Floats) -> float:
            d_l, d_pull = step[1::2], pull_q * step[0::2]
            d_middle = (d_l[1:] + d_l[:-1]) / 2 - h / 8 * np.diff(d_pull) + bent
            terms = slope[:-1] * d_l[:-1] + 4 * slope_m * d_middle + slope[1:] * d_l[1:]
            return float(h @ terms) / 6

        down = change(along, h / 8 * np.diff(pull))
        return (kl - float(value) - change(plain, np.zeros_like(h))) / down if down != 0 else math.nan

    @staticmethod
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

    def remeshed(self, state: State, size: int) -> State:
        """The state on `size` cells that share evenly what u, Q, G(u), G(Q) and L (where q is seen) change by."""
        cdf = np.clip(state.cdf, 0.0, 1.0)
        level = np.maximum(state.log_q, -40.0)
        decoded = self.procedure.cdf(state.u) + self.procedure.cdf(cdf)
        change = state.widths + np.abs(np.diff(cdf)) + np.abs(np.diff(decoded)) + 0.1 * np.abs(np.diff(level))
        change = change + 0.1 * np.abs(np.diff(np.log1p(np.abs(state.log_q))))
        for shape in (self.procedure.density(state.u), self.procedure.density(cdf)):
            change = change + 0.2 * np.abs(np.diff(shape)) / max(float(shape.max()), 1e-300)
        change = np.convolve(np.pad(change, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid") + 1e-6
        total = np.append(0.0, np.cumsum(change))
        wanted = np.linspace(0.0, total[-1], size + 1)[1:-1]
        cell = np.clip(np.searchsorted(total, wanted, side="right") - 1, 0, len(change) - 1)
        part = (wanted - total[cell]) / change[cell]
        h = state.widths[cell]
        low, u, top = state.u[cell + 1] < 0.5, state.u[cell] + part * h, state.top[cell + 1] + (1 - part) * h
        u, top = np.where(low, u, 1 - top), np.where(low, 1 - u, top)
        with np.errstate(over="ignore", invalid="ignore"):
            pull, _ = self._pull(state.u, state.cdf, state.log_beta)
        new_cdf = monotone_cubic(state.cdf, np.exp(state.log_q), cell, part, h)
        log_q = monotone_cubic(state.log_q, pull, cell, part, h)
        ends = [np.array([0.0, 1.0]), np.array([1.0, 0.0]), state.cdf[[0, -1]], state.log_q[[0, -1]]]
        columns = [
            np.concatenate([end[:1], inner, end[1:]]) for end, inner in zip(ends, (u, top, new_cdf, log_q), strict=True)
        ]
        return State(columns[0], columns[1], columns[2], columns[3], state.log_beta)

    def _flat(self) -> State:
        """The base policy on a mesh that follows G."""
        u = np.linspace(0.0, 1.0, 4 * COARSE + 1)
        u = np.unique(np.concatenate([u, u[1] * 0.7 ** np.arange(40), 1 - u[1] * 0.7 ** np.arange(40)]))
        return self.remeshed(State(u, 1 - u, u, np.zeros_like(u), -LOWEST_LOG_BETA / 2), COARSE)

    def _tilted(self, state: State, kl: float | None, log_beta: float | None) -> State:
        """The tilt of the reward int g(u) g(Q) of a state's Q, on its mesh, at a KL or at log beta."""
        pull, _ = self._pull(state.u, state.cdf, 0.0)
        h = state.widths
        steps = h * (pull[1:] + pull[:-1]) / 2
        reward = np.append(0.0, np.cumsum(steps)) if self.turned else np.append(-np.cumsum(steps[::-1])[::-1], 0.0)
        low, high = -700.0, 700.0
        x = -log_beta if log_beta is not None else -math.log(max(-reward[0], -reward[-1], 1e-300))
        log_q = cdf = np.zeros_like(reward)
        for _ in range(60):
            exponent = np.maximum(reward * math.exp(x), -1e4)
            q = np.exp(exponent)
            cdf = np.append(0.0, np.cumsum(h * (q[1:] + q[:-1]) / 2))
            log_q = exponent - math.log(cdf[-1])
            terms = q / cdf[-1] * log_q
            value = float(h @ (terms[1:] + terms[:-1])) / 2
            if kl is None or abs(value - kl) < 1e-3 * kl:
                break
            low, high = (x, high) if value < kl else (low, x)
            x = (low + high) / 2 if high - low < 8 else x + math.copysign(2.0, kl - value)
        return State(state.u, state.top, cdf / cdf[-1], log_q, -x)

    def continued(self, log_beta: float | None, kl: float | None) -> State | None:
        """The optimum reached from the base along growing KL, on a coarse mesh; None where the path is lost."""
        flat = self._flat()
        if log_beta is not None:
            near = self._tilted(flat, None, log_beta)
            direct = self.newton(near, None) if self.measures(near)[1] < 0.05 else None
            if direct is not None:
                return direct
        reached = 0.1 if kl is None else min(kl, 0.1)
        state = self._from(self._fitted(flat, reached), reached)
        while log_beta is not None and state is not None and state.log_beta <= log_beta and reached > 1e-5:
            reached /= 10
            state = self._from(self._fitted(flat, reached), reached)
        return None if state is None else self._along(state, reached, log_beta, kl)

    def _along(self, state: State, reached: float, log_beta: float | None, kl: float | None) -> State | None:
        """Continue an optimum of KL `reached` to kl, or until log beta is passed, then Newton at log beta."""
        step, drift = 0.4, -1.0
        while kl is None or reached < kl:
            target = reached + step if kl is None else min(reached + step, kl)
            found = self._next(state, target, target - reached, drift)
            if found is not None and log_beta is not None and found.log_beta <= log_beta:
                share = (state.log_beta - log_beta) / (state.log_beta - found.log_beta)
                rise = share * (target - reached)
                close = self._next(state, reached + rise, rise, drift) or found
                final = self.newton(with_beta(close, log_beta), None)
                if final is not None:
                    return final
                found = None
            if found is None:
                step /= 2
                if step < 1e-4:
                    return None
                continue
            drift = (found.log_beta - state.log_beta) / (target - reached)
            state, reached, step = found, target, min(step * 1.5, 0.8)
        return state

    def _next(self, state: State, kl: float, rise: float, drift: float) -> State | None:
        """The optimum at kl, `rise` above the state's, from the best guess that converges."""
        found = self.newton(self._shrunk(state, rise, drift), kl) if kl - rise >= 0.5 else None
        return found or self._from(state, kl)

    def _shrunk(self, state: State, rise: float, drift: float) -> State:
        """A guess at KL + rise: the policy squeezed towards the top by e^-rise, which leaves its shape there."""
        top, above = (state.u, state.cdf) if self.turned else (state.top[::-1], 1 - state.cdf[::-1])
        log_q = (state.log_q if self.turned else state.log_q[::-1]) + rise
        squeeze = math.exp(-rise)
        rest = np.linspace(squeeze, 1.0, 41)[1:]
        total = 1 + math.exp(log_q[-1]) * (1 - squeeze)
        above = np.concatenate([above, 1 + math.exp(log_q[-1]) * (rest - squeeze)]) / total
        log_q = np.concatenate([log_q, np.full_like(rest, log_q[-1])]) - math.log(total)
        top = np.concatenate([top * squeeze, rest])
        log_beta = state.log_beta + drift * rise
        if self.turned:
            return self.remeshed(State(top, 1 - top, above, log_q, log_beta), COARSE)
        top, above = top[::-1], above[::-1]
        return self.remeshed(State(1 - top, top, 1 - above, log_q[::-1], log_beta), COARSE)

    def _from(self, state: State, kl: float) -> State | None:
        """The optimum at kl by Newton from a policy, or from the tilt of its own reward where g falls."""
        if self.monotone != "increasing":
            found = self.newton(self._fitted(state, kl), kl)
            if found is not None:
                return found
        return self.newton(self.remeshed(state, COARSE), kl)

    def _fitted(self, state: State, kl: float) -> State:
        """A policy with the given KL near its own reward's tilt: iterates ascend W where g is non-increasing."""
        for _ in range(1 if self.monotone == "increasing" else 3):
            state = self.remeshed(self._tilted(state, kl, None), COARSE)
        return state

    def restarted(self, log_beta: float | None, kl: float | None) -> list[State | None]:
        """Optima from other starts, where g is not monotone: tilts fitted to bottom-heavy and top-heavy policies."""
        if self.monotone != "neither":
            return []
        found: list[State | None] = []
        flat = self._flat()
        for shape in (flat.u**4, 1 - flat.top**4):
            start = State(flat.u, flat.top, shape, flat.log_q, flat.log_beta)
            state = self._tilted(start, kl, log_beta)
            for _ in range(3):
                state = self.remeshed(self._tilted(state, kl, log_beta), COARSE)
            found.append(self.newton(state, kl))
        return found

    def solution(self, state: State) -> Solution:
        """The curves in distances 1 - u, with the measures, of a converged state."""
        win_rate, kl = self.measures(state)
        beta = math.exp(state.log_beta)
        q, cdf = np.exp(state.log_q), np.clip(state.cdf, 0.0, 1.0)
        pull, pull_q = self._pull(state.u, cdf, state.log_beta)
        bend = self.sign * self.procedure.slope(state.u) * self.procedure.density(cdf) / beta + pull_q * q
        if self.turned:  # u already is the distance from the top
            kept = np.append(np.diff(state.u) > 0, True)
            curve = [a[kept] for a in (state.u, state.log_q, -pull, bend, 1 - cdf, q)]
        else:
            kept = np.append(np.diff(state.top) < 0, True)[::-1]
            curve = [a[::-1][kept] for a in (state.top, state.log_q, pull, bend, cdf, q)]
        top, log_q, pull, bend, cdf, q = curve
        seen = log_q > -1e4
        return Solution(
            state.log_beta,
            kl,
            win_rate,
            Curve(top, beta * (log_q - log_q[-1]), -beta * pull, beta * bend, True),
            Curve(top, np.maximum(log_q, -1e4), np.where(seen, -pull, 0.0), np.where(seen, bend, 0.0), True),
            Curve(top, cdf, -q, q * pull, True),
        )
