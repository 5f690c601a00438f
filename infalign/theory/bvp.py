"""The optimum of any procedure: Newton on the discretised boundary-value problem (`collocation`), from good starts.

From a small KL, where the optimum is nearly the tilt of int g^2, solutions are continued to growing KL, on a finer
mesh where steps become short; where optima may be many (g not non-decreasing) other starts compete.

Theory: derived in our notes (section 3) from InfAlign's coupled equations (arXiv:2412.19792).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from infalign.theory.collocation import MOST_STEPS, Collocation, projected
from infalign.theory.deep import is_deep, solve_deep
from infalign.theory.frontier import Solution, from_nodes
from infalign.theory.logarithmic import LogCollocation
from infalign.theory.mesh import State, with_beta
from infalign.theory.procedures import Procedure
from infalign.types import InputError

Floats = NDArray[np.float64]

COARSE, FINE = 160, 1600
ROUNDS = 4
FEW_STEPS = 12
SHORT = 0.05


def solve_general(procedure: Procedure, log_beta: float | None, kl: float | None) -> Solution:
    """The optimum of any procedure at log beta or at a KL in nats (exactly one given).

    Raises InputError when Newton fails from every start.
    """
    search = _Search(procedure)
    first = search.continued(log_beta, kl)
    reached = first is not None and (kl is None or search.kl(first) > kl * (1 - 1e-6))
    best = None
    if kl is None or not search.in_logs or (first is not None and reached and not search.is_deep(first)):
        best = search.refined(first, log_beta, kl)
    if best is not None:
        return _solution(search, best)
    deep = _deepened(search, kl) if kl is not None and search.in_logs else None
    if deep is None:
        given = f"kl={kl}" if log_beta is None else f"beta={math.exp(log_beta):g}"
        raise InputError(f"no optimum of {procedure!r} found at {given}; ask for a smaller KL or a larger beta")
    return deep


def _deepened(search: _Search, kl: float) -> Solution | None:
    """The optimum continued in logs from the last state that logs confirm: a coarse mesh may have spurious ones."""
    for start in (0.1, 0.01):
        if start < 0.1:
            search.continued(None, kl, start)
        for state in reversed(search.path):
            found = solve_deep(LogCollocation(search.procedure), state, search.kl(state), kl)
            if found is not None:
                return found
    return None


class _Search(Collocation):
    """The ways to an optimum: directly at a beta, along growing KL, and from other starts."""

    def __init__(self, procedure: Procedure) -> None:
        super().__init__(procedure)
        picks = [(c.n, rank) for c in procedure.components for rank, _ in c.picks]
        self.single = len(picks) == 1
        self.n, self.rank = picks[0]
        self.in_logs = self.single and self.monotone == "neither"
        self.path: list[State] = []
        self.points: list[tuple[float, float]] = []
        self.squeezes = True
        self.size = COARSE
        self.low = self.single and 8 * self.rank <= self.n

    def is_deep(self, state: State) -> bool:
        """Is this an optimum of a k-th of n that is better continued to a larger KL in logs?"""
        return self.in_logs and is_deep(state, self.rank, self.n)

    def objective(self, state: State, log_beta: float | None) -> float:
        """W - beta KL, or -log(1 - W) when the KL is given."""
        if log_beta is not None:
            return self.win_rate(state) - math.exp(log_beta) * self.kl(state)
        return self.win_rate(state) if self.turned else -self.log_lost(state)

    def _flat(self) -> State:
        """The base policy on a mesh that follows G."""
        u = np.linspace(0.0, 1.0, 4 * self.size + 1)
        u = np.unique(np.concatenate([u, u[1] * 0.7 ** np.arange(40), 1 - u[1] * 0.7 ** np.arange(40)]))
        state = State(u, 1 - u, u, np.zeros_like(u), 0.0)
        return self.remeshed(with_beta(state, 10.0 + float(self.log_reward_slope(state).max())), self.size)

    def _tilted(self, state: State, kl: float | None, log_beta: float | None) -> State:
        """The tilt of the reward int g(u) g(Q) of a state's Q, on its mesh, at a KL or at log beta.

        log beta may lie hundreds away from its first guess: strides double until it is bracketed.
        """
        log_slope = self.log_reward_slope(state)
        highest = float(log_slope.max())
        slope = np.exp(log_slope - highest)
        steps = state.widths * (slope[1:] + slope[:-1]) / 2
        reward = -np.append(0.0, np.cumsum(steps)) if self.turned else -np.append(np.cumsum(steps[::-1])[::-1], 0.0)
        low, high, stride = -math.inf, math.inf, 1.0
        x = highest - log_beta if log_beta is not None else -math.log(max(-reward[0], -reward[-1], 1e-300))
        found = state
        for _ in range(60):
            level = np.maximum(reward * math.exp(min(x, 700.0)), -1e4)
            found = projected(State(state.u, state.top, state.cdf, level, highest - x))
            terms = np.exp(found.log_q) * found.log_q
            value = float(state.widths @ (terms[1:] + terms[:-1])) / 2
            if kl is None or abs(value - kl) < 1e-2 * kl:
                break
            low, high = (x, high) if value < kl else (low, x)
            stride *= 2
            x = (low + high) / 2 if math.isfinite(low + high) else x + math.copysign(stride, kl - value)
        return found

    def continued(self, log_beta: float | None, kl: float | None, start: float = 0.1) -> State | None:
        """The optimum reached from the base along growing KL, on a coarse mesh; None where the path is lost."""
        flat = self._flat()
        if log_beta is not None:
            found = self._direct(flat, log_beta)
            if found is not None:
                return found
        reached, state = (start if kl is None else min(kl, start)), None
        while reached > 1e-9 and (state is None or (log_beta is not None and state.log_beta <= log_beta)):
            state = self._from(self._fitted(flat, reached), reached)
            reached /= 10
        reached *= 10
        return None if state is None else self._along(state, reached, log_beta, kl)

    def _direct(self, flat: State, log_beta: float) -> State | None:
        """The optimum at log beta by Newton from fitted tilts, the likelier start first."""
        shapes = [flat.u] if self.monotone != "neither" else [1 - flat.top**4, flat.u]
        for shape in reversed(shapes) if self.low else shapes:
            state = self._tilted(State(flat.u, flat.top, shape, flat.log_q, 0.0), None, log_beta)
            for _ in range(ROUNDS if self.turned else 1):
                state = self._tilted(self.remeshed(state, self.size), None, log_beta)
            state = self.remeshed(state, self.size)
            found = self.newton(state, None)
            if found is not None:
                return found
        return None

    def _along(self, state: State, reached: float, log_beta: float | None, kl: float | None) -> State | None:
        """Continue an optimum of KL `reached` to kl or until it is deep, or past log beta, then Newton at log beta."""
        step = min(0.4, 2 * reached)
        self.path, self.points = [state], [(reached, state.log_beta)]
        while kl is None or (reached < kl and not self.is_deep(state)):
            target = reached + step if kl is None else min(reached + step, kl)
            found = self._next(state, target, target - reached)
            if found is not None and log_beta is not None and found.log_beta <= log_beta:
                share = (state.log_beta - log_beta) / (state.log_beta - found.log_beta)
                rise = share * (target - reached)
                close = self._next(state, reached + rise, rise) or found
                final = self.newton(with_beta(close, log_beta), None)
                if final is not None:
                    return final
                found = None
            if found is None:
                step /= 2
                if step < SHORT and self.turned and self.size < 4 * COARSE:
                    state, reached, step = self._resolved(state, reached)
                if step < 1e-3 and self.in_logs and kl is not None:
                    return state
                if step < 1e-4:
                    return None
                continue
            state, reached, step = found, target, min(step * 1.5, 0.8)
            self.path.append(state)
            self.points.append((reached, state.log_beta))
        return state

    def _resolved(self, state: State, reached: float) -> tuple[State, float, float]:
        """On twice as fine a mesh: the last optimum of the path that it confirms, its KL and the step to go on with.

        Near a strongly negative soft tilt of many candidates q ends in an edge too sharp for the coarsest mesh, which
        may even have spurious optima: the path is dropped from there on.
        """
        self.size *= 2
        for index in reversed(range(len(self.path))):
            kl = self.points[index][0]
            found = self.newton(self.remeshed(self.path[index], self.size), kl)
            if found is not None:
                self.path, self.points = [*self.path[:index], found], [*self.points[:index], (kl, found.log_beta)]
                return found, kl, 8 * SHORT
        return state, reached, SHORT

    def _next(self, state: State, kl: float, rise: float) -> State | None:
        """The optimum at kl, `rise` above the state's, from the first guess that converges.

        Where g is monotone good guesses converge in few steps, and a smaller rise is better than more of them.
        Near Best-of-N the policy grows a spike that squeezing misses: once it fails it is not tried again.
        """
        hasty, settled = self.monotone != "neither" and rise > (SHORT if self.turned else 0.1), kl - rise >= 0.5
        steps, found = FEW_STEPS if hasty else MOST_STEPS, None
        if settled and self.squeezes:
            found = self.newton(self._shrunk(state, rise, self._foreseen(kl)), kl, steps=steps)
            self.squeezes = found is not None or self.monotone != "increasing"
        if found is None and self.turned:
            found = self.newton(self._fitted(state, kl, 2), kl, steps=steps)
        if found is not None or (self.turned and hasty and settled):
            return found
        return self._from(state, kl, MOST_STEPS if self.turned else steps)

    def _foreseen(self, kl: float) -> float:
        """log beta at a KL from the path's last points: straight, or bent (within a factor 2) where g falls."""
        (last, value), before = self.points[-1], self.points[-3:-1]
        slopes = [(value - other) / (last - at) for at, other in before]
        if len(slopes) < 2 or not self.turned:
            return value + (slopes[-1] if slopes else -1.0) * (kl - last)
        bend = (slopes[1] - slopes[0]) / (before[1][0] - before[0][0])
        ratio = 1 + bend * (kl - before[1][0]) / slopes[1] if slopes[1] < 0 else 1.0
        return value + slopes[1] * min(max(ratio, 0.5), 2.0) * (kl - last)

    def _shrunk(self, state: State, rise: float, log_beta: float) -> State:
        """A guess at KL + rise: the policy squeezed towards the top by e^-rise, which leaves its shape there."""
        top, above = (state.u, state.cdf) if self.turned else (state.top[::-1], 1 - state.cdf[::-1])
        log_q = (state.log_q if self.turned else state.log_q[::-1]) + rise
        squeeze = math.exp(-rise)
        rest = np.linspace(squeeze, 1.0, 41)[1:]
        total = 1 + math.exp(log_q[-1]) * (1 - squeeze)
        above = np.concatenate([above, 1 + math.exp(log_q[-1]) * (rest - squeeze)]) / total
        log_q = np.concatenate([log_q, np.full_like(rest, log_q[-1])]) - math.log(total)
        top = np.concatenate([top * squeeze, rest])
        if self.turned:
            return self.remeshed(State(top, 1 - top, above, log_q, log_beta), self.size)
        top, above = top[::-1], above[::-1]
        return self.remeshed(State(1 - top, top, 1 - above, log_q[::-1], log_beta), self.size)

    def _from(self, state: State, kl: float, steps: int = MOST_STEPS) -> State | None:
        """The optimum at kl by Newton from a policy, or from the tilt of its own reward where g falls."""
        warm = self.newton(self.remeshed(state, self.size), kl, steps=steps)
        if warm is not None or self.monotone == "increasing":
            return warm
        return self.newton(self._fitted(state, kl), kl)

    def _fitted(self, state: State, kl: float, rounds: int = 3) -> State:
        """A policy with the given KL near its own reward's tilt: iterates ascend W where g is non-increasing."""
        for _ in range(1 if self.monotone == "increasing" else rounds):
            state = self.remeshed(self._tilted(state, kl, None), self.size)
        return state

    def refined(self, first: State | None, log_beta: float | None, kl: float | None) -> State | None:
        """The best of a first optimum and those from other starts, on a fine mesh; None where Newton fails there."""
        candidates = [first, *self.restarted(log_beta, kl, first)]
        best = max((c for c in candidates if c is not None), key=lambda c: self.objective(c, log_beta), default=None)
        finest = FINE if self.procedure.n <= 256 else 2 * FINE
        for size, tolerance in ((max(FINE // 4, self.size), 1e-3), (finest, 1e-6)):
            best = None if best is None else self.newton(self.remeshed(best, size), kl, tolerance)
        return best

    def restarted(self, log_beta: float | None, kl: float | None, known: State | None) -> list[State | None]:
        """Optima from other starts, where g is not monotone: tilts fitted to bottom-heavy and top-heavy policies.

        Every start that converges finds the same optimum for a k-th of n, which is spared.
        A start whose fit comes as close as 0.02 in Q to the `known` optimum leads back there and is dropped.
        """
        if self.monotone != "neither" or (self.single and known is not None):
            return []
        found: list[State | None] = []
        flat = self._flat()
        for shape in (flat.u**4, 1 - flat.top**4):
            state = self._tilted(State(flat.u, flat.top, shape, flat.log_q, flat.log_beta), kl, log_beta)
            for _ in range(3):
                state = self.remeshed(self._tilted(state, kl, log_beta), self.size)
            if known is None or np.max(np.abs(np.interp(state.u, known.u, known.cdf) - state.cdf)) > 0.02:
                found.append(self.newton(state, kl))
        return found


def _solution(search: Collocation, state: State) -> Solution:
    """The curves in distances 1 - u, with the measures, of a converged state."""
    procedure = search.procedure
    cdf = np.clip(state.cdf, 0.0, 1.0)
    near_top = (state.top < 0.1) & (procedure.monotone == "neither")
    steep = np.where(near_top, -procedure.mirror.log_density(state.top)[1], procedure.log_density(state.u)[1])
    pull, pull_q = search.pull(search.log_g(state.u, state.top), cdf, state.log_beta)
    bend = pull * steep + pull_q * np.exp(state.log_q)
    if search.turned:  # u already is the distance from the top
        nodes = np.stack([state.u, state.log_q, -pull, bend, 1 - cdf])
    else:
        nodes = np.stack([state.top, state.log_q, pull, bend, cdf])[:, ::-1]
    return from_nodes(state.log_beta, search.kl(state), search.win_rate(state), nodes)
