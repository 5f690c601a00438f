"""The optimum of k-th of n at a large KL: the boundary-value problem in log Q, which reaches where Q underflows.

Near the worst rank the policy avoids all u below about 1 - e^{-KL}, where Q is as small as e^{-n KL}. In the place
t = log(u/(1-u)) the unknowns V = log Q and L = log q obey
V' = u (1-u) e^{L-V}, L' = u (1-u) g(u) g(e^V)/beta, with V = L + log u at the bottom and 1 - Q = q (1-u) at the top.
Below the layer where Q rises the solution is quasi-steady, e^{L-V} ~ -(log g)'(u)/(r-1) for rank r: smooth, but a
saddle, so that only a boundary-value solver holds it. When the KL grows the layer moves in -log(1-u), and V and L at a
fixed u below it shift by constants: a guess close enough for large steps.

Theory: derived in our notes (section 3) from InfAlign's coupled equations (arXiv:2412.19792).
"""

# scipy ships no type stubs: what it returns is unknown to pyright.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special
from scipy.linalg import lapack

from infalign.theory.mesh import monotone_cubic
from infalign.theory.procedures import Procedure

Floats = NDArray[np.float64]

MOST_STEPS = 25


@dataclass(frozen=True)
class Deep:
    """A policy in logs at places t = log(u/(1-u)): V = log Q and L = log q, all (Q,), and log beta."""

    t: Floats
    log_cdf: Floats
    log_q: Floats
    log_beta: float


class LogCollocation:
    """The equations of one rank r of n, discretised as in `collocation`."""

    def __init__(self, procedure: Procedure) -> None:
        self.procedure = procedure
        self.n, self.rank = procedure.components[0].n, procedure.components[0].picks[0][0]
        self.log_scale = -float(special.betaln(self.rank, self.n - self.rank + 1))

    def log_g(self, log_p: Floats, log_rest: Floats) -> Floats:
        """log g(p) from log p and log(1-p)."""
        return self.log_scale + (self.rank - 1) * log_p + (self.n - self.rank) * log_rest

    def rates(self, t: Floats, y: Floats, log_beta: float) -> tuple[Floats, Floats]:
        """(V', L') at the nodes, (2, Q), and how steep log g is in V, (Q,)."""
        log_u, log_top = -np.logaddexp(0, -t), -np.logaddexp(0, t)
        log_cdf = np.minimum(y[0], -1e-300)
        rest = -np.expm1(log_cdf)
        log_pull = self.log_g(log_u, log_top) + self.log_g(log_cdf, np.log(rest)) - log_beta
        powers = log_u + log_top + np.stack([y[1] - log_cdf, log_pull])
        steep = (self.rank - 1) - (self.n - self.rank) * np.exp(log_cdf) / rest
        return np.exp(np.minimum(powers, 600.0)), steep

    def newton(self, state: Deep, kl: float, tolerance: float) -> Deep | None:
        """Newton steps at a KL, damped; None when they do not converge."""
        for _ in range(MOST_STEPS):
            with np.errstate(all="ignore"):
                step, step_beta, change = self._step(state, kl)
            size = float(np.max(np.abs(change)))
            if not math.isfinite(size) or not math.isfinite(step_beta):
                return None
            damping = min(1.0, 2.0 / size) if size > 0 else 1.0
            state = replace(
                state,
                log_cdf=np.minimum(state.log_cdf + damping * step[0], -1e-300),
                log_q=state.log_q + damping * step[1],
                log_beta=state.log_beta + damping * step_beta,
            )
            if size < tolerance:
                return state
        return None

    def _step(self, state: Deep, kl: float) -> tuple[Floats, float, Floats]:
        """The full Newton step in (V, L), in log beta, and the changes of log V' and log L' where they count."""
        t, y, h = state.t, np.stack([state.log_cdf, state.log_q]), np.diff(state.t)
        f, steep = self.rates(t, y, state.log_beta)
        jacobian = _jacobian(f, steep)
        y_m = (y[:, 1:] + y[:, :-1]) / 2 - h / 8 * np.diff(f)
        f_m, steep_m = self.rates((t[1:] + t[:-1]) / 2, y_m, state.log_beta)
        jacobian_m = _jacobian(f_m, steep_m)
        off = np.diff(y) - h / 6 * (f[:, :-1] + 4 * f_m + f[:, 1:])
        bent = np.stack([np.zeros_like(h), h / 8 * np.diff(f[1])])
        off_beta = -4 * np.einsum("abi,bi->ai", jacobian_m, bent)
        off_beta[1] += f[1, :-1] + 4 * f_m[1] + f[1, 1:]
        off_beta *= h / 6
        eye = np.eye(2)[:, :, None]
        left = -eye - h / 6 * (jacobian[..., :-1] + 4 * _times(jacobian_m, eye / 2 + h / 8 * jacobian[..., :-1]))
        right = eye - h / 6 * (jacobian[..., 1:] + 4 * _times(jacobian_m, eye / 2 - h / 8 * jacobian[..., 1:]))
        band = np.zeros((7, 2 * len(t)))
        for i in range(2):
            for j in range(2):
                band[4 + 1 + i - j, j : 2 * len(h) : 2] = left[i, j]
                band[4 + 1 + i - j - 2, 2 + j : 2 + 2 * len(h) : 2] = right[i, j]
        sides = np.zeros((2 * len(t), 2))
        sides[1:-1:2, 0], sides[2:-1:2, 0] = -off
        sides[1:-1:2, 1], sides[2:-1:2, 1] = -off_beta
        # V = L + log u at the bottom, 1 - Q = q (1-u) at the top
        band[4, 0], band[3, 1] = 1.0, -1.0
        sides[0, 0] = -(y[0, 0] - y[1, 0] + np.logaddexp(0, -t[0]))
        last = math.exp(min(y[1, -1] - np.logaddexp(0, t[-1]), 3.0))
        band[5, -2], band[4, -1] = 1.0, last
        sides[-1, 0] = -(y[0, -1] + last)
        solution, info = lapack.dgbsv(2, 2, band, sides)[2:]  # pyright: ignore[reportAttributeAccessIssue]
        if info != 0:
            return np.full_like(y, np.nan), math.nan, np.full_like(y, np.nan)
        plain, along = solution[:, 0].reshape(-1, 2).T, solution[:, 1].reshape(-1, 2).T
        value, slope = self._kl_terms(t, y[1])
        value_m, slope_m = self._kl_terms((t[1:] + t[:-1]) / 2, y_m[1])

        def change(step: Floats, bend: Floats) -> float:
            df = jacobian[1, 0] * step[0]
            middle = (step[1, 1:] + step[1, :-1]) / 2 - h / 8 * np.diff(df) + bend
            terms = slope * step[1]
            return float(h @ (terms[:-1] + 4 * slope_m * middle + terms[1:])) / 6

        missing = kl - float(h @ (value[:-1] + 4 * value_m + value[1:])) / 6 - change(plain, np.zeros_like(h))
        step_beta = float(np.float64(missing) / change(along, bent[1]))
        step = plain + step_beta * along
        moved = np.stack([step[1] - step[0], np.minimum(f[1], 1) * (steep * step[0] - step_beta)])
        return step, step_beta, moved

    def _kl_terms(self, t: Floats, log_q: Floats) -> tuple[Floats, Floats]:
        """The integrand of the KL in t and its derivative in L."""
        density = np.exp(np.minimum(log_q - np.logaddexp(0, -t) - np.logaddexp(0, t), 600.0))
        return density * log_q, density * (log_q + 1)

    def remeshed(self, state: Deep, size: int) -> Deep:
        """The state on cells that share evenly what Q, V and L near the top and the rates change by.

        About `size` of them, more where V spans thousands: cells far below the layer must not be longer than a few V'.
        """
        t, h, y = state.t, np.diff(state.t), np.stack([state.log_cdf, state.log_q])
        with np.errstate(over="ignore", divide="ignore"):
            f, _ = self.rates(t, y, state.log_beta)
        rate = np.minimum(f[0, 1:], f[0, :-1])
        change = 0.02 * h + h * np.minimum(rate, 2.0 * self.n) / 100
        change = change + np.abs(np.diff(np.log1p(f))).sum(0) + 0.03 * np.abs(np.diff(np.maximum(y, -40.0))).sum(0)
        change = change + 0.5 * np.abs(np.diff(np.exp(y[0])))
        change = np.convolve(np.pad(change, 1, mode="edge"), [0.25, 0.5, 0.25], mode="valid")
        total = np.append(0.0, np.cumsum(change))
        wanted = np.linspace(0.0, total[-1], int(size * (1 - y[0, 0] / 1500)) + 1)[1:-1]
        cell = np.clip(np.searchsorted(total, wanted, side="right") - 1, 0, len(h) - 1)
        part = (wanted - total[cell]) / change[cell]
        inner = monotone_cubic(y[0], f[0], cell, part, h[cell])
        place = np.concatenate([t[:1], t[cell] + part * h[cell], t[-1:]])
        log_cdf = np.concatenate([y[0, :1], inner, y[0, -1:]])
        return Deep(place, log_cdf, log_cdf + np.interp(place, t, y[1] - y[0]), state.log_beta)

    def kl(self, state: Deep) -> float:
        """KL in nats by Simpson's rule, as Newton's bordering has it."""
        middle, y_m = self._middles(state)
        value, value_m = self._kl_terms(state.t, state.log_q)[0], self._kl_terms(middle, y_m[1])[0]
        return float(np.diff(state.t) @ (value[:-1] + 4 * value_m + value[1:])) / 6

    def log_lost(self, state: Deep) -> float:
        """log(1 - W) by Simpson's rule."""
        middle, y_m = self._middles(state)
        ends, inner = self._log_lost_terms(state.t, state.log_cdf), self._log_lost_terms(middle, y_m[0])
        log_h = np.log(np.diff(state.t) / 6)
        return float(
            np.logaddexp.reduce(np.concatenate([ends[:-1], ends[1:], inner + math.log(4)]) + np.tile(log_h, 3))
        )

    def _log_lost_terms(self, t: Floats, log_cdf: Floats) -> Floats:
        """log of g(u) G(Q) u (1-u), with G(Q) ~ Q g(Q)/r where it underflows."""
        log_u, log_top = -np.logaddexp(0, -t), -np.logaddexp(0, t)
        decoded = special.betainc(self.rank, self.n - self.rank + 1, np.exp(log_cdf))
        tail = self.log_g(log_cdf, np.log(-np.expm1(log_cdf))) + log_cdf - math.log(self.rank)
        log_decoded = np.where(decoded > 1e-290, np.log(np.maximum(decoded, 1e-300)), tail)
        return self.log_g(log_u, log_top) + log_u + log_top + log_decoded

    def _middles(self, state: Deep) -> tuple[Floats, Floats]:
        """The cells' middles and the collocation polynomial's (V, L) there."""
        y = np.stack([state.log_cdf, state.log_q])
        f, _ = self.rates(state.t, y, state.log_beta)
        y_m = (y[:, 1:] + y[:, :-1]) / 2 - np.diff(state.t) / 8 * np.diff(f)
        return (state.t[1:] + state.t[:-1]) / 2, y_m


def _jacobian(f: Floats, steep: Floats) -> Floats:
    """d(V', L')/d(V, L): (2, 2, Q)."""
    return np.array([[-f[0], f[0]], [f[1] * steep, np.zeros_like(steep)]])


def _times(a: Floats, b: Floats) -> Floats:
    """Products of 2 x 2 matrices, one per cell."""
    return np.einsum("abi,bci->aci", a, np.broadcast_to(b, a.shape))
