"""What K samples in place of exact quantiles do to a trained policy: the win rate lost, and the beta that it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq

from infalign.calibration.quantile import clip_to_open
from infalign.runtime.seeds import stream
from infalign.theory.procedures import Procedure
from infalign.theory.tilted import tilt

Array = NDArray[np.float64]


def expected_cost(
    transform: Callable[[ArrayLike], Array],
    procedure: Procedure,
    count: int,
    kl: float,
    draws: int = 200,
    seed: int = 0,
) -> float:
    """The win rate that calibrating with `count` samples loses against exact calibration, at mean KL `kl`.

    A policy tilted by `Phi` of the empirical quantile is piecewise constant between the order statistics of its
    reference; KL and win rate are averaged over `draws` simulated references, with beta such that the mean KL is `kl`
    (infalign/theory/README.md, equation 12).
    """
    simulated = _Simulated(transform, count, draws, seed)
    found = _mean_win_rate(procedure, simulated.widths_DJ, simulated.masses(simulated.log_rate(kl)))
    return tilt(transform, kl=kl).win_rate(procedure) - found


def beta_for_kl(
    transform: Callable[[ArrayLike], Array], count: int, kl: float, draws: int = 200, seed: int = 0
) -> float:
    """The beta at which a policy that is trained on `count` samples a prompt is expected to reach `kl` nats.

    The optimum's own beta reaches it with exact quantiles alone: few samples cut off the top of `Phi`, where its mass
    is (infalign/theory/README.md, equation 12).

    >>> from infalign import BestOfN, optimal_transform
    >>> transform = optimal_transform(BestOfN(4), kl=1.0)
    >>> [round(beta_for_kl(transform, count, 1.0) / transform.beta, 1) for count in (8, 16, 64, 4096)]
    [0.5, 0.7, 0.9, 1.0]
    """
    simulated = _Simulated(transform, count, draws, seed)
    return simulated.scale / float(np.exp(simulated.log_rate(kl)))


class _Simulated:
    """References of `count` samples, drawn `draws` times: the base's mass between neighbours, and `Phi` there.

    A policy tilted by `Phi` of the empirical quantile is piecewise constant between the order statistics of its
    references (infalign/theory/README.md, equation 12).
    """

    def __init__(self, transform: Callable[[ArrayLike], Array], count: int, draws: int, seed: int) -> None:
        # K uniforms cut [0, 1] into K + 1 spacings, whose widths are Dirichlet(1, ..., 1); a sample that falls into
        # spacing j beats j of the K references, so its calibrated reward is j / K
        self.widths_DJ = stream(seed, "cost", count).dirichlet(np.ones(count + 1), size=draws)
        levels_J = clip_to_open(np.arange(count + 1) / count, count)
        phi_J = np.asarray(transform(levels_J), dtype=np.float64)
        self.scale = max(float(np.ptp(phi_J)), 1e-12)
        # shifted and scaled to [-1, 0]: the scale goes into the rate 1/beta, which is searched for anyway
        self.phi_J = (phi_J - phi_J.max()) / self.scale

    def masses(self, log_rate: float) -> Array:
        """(D, J) of the policy tilted by e^log_rate times the scaled `Phi`."""
        weights_DJ = self.widths_DJ * np.exp(self.phi_J * np.exp(log_rate))
        return weights_DJ / weights_DJ.sum(1, keepdims=True)

    def log_rate(self, kl: float) -> float:
        """The rate at which the mean KL is `kl`; the largest one where no rate reaches it."""

        def excess(log_rate: float) -> float:
            masses_DJ = np.maximum(self.masses(log_rate), 1e-300)
            return float((masses_DJ * np.log(masses_DJ / np.maximum(self.widths_DJ, 1e-300))).sum(1).mean()) - kl

        found: Any = brentq(excess, -8.0, 12.0, xtol=1e-6) if excess(12.0) > 0 else 12.0
        return float(found)


def _mean_win_rate(procedure: Procedure, widths_DJ: Array, masses_DJ: Array) -> float:
    """`1 - int g(u) G(Q(u)) du` for piecewise constant densities, by Gauss-Legendre on each piece, averaged over D."""
    nodes, weights = np.polynomial.legendre.leggauss(6)
    share = (nodes + 1.0) / 2.0
    left_DJ, below_DJ = np.cumsum(widths_DJ, 1) - widths_DJ, np.cumsum(masses_DJ, 1) - masses_DJ
    total = 0.0
    for part, weight in zip(share, weights / 2.0, strict=True):
        # within a piece both CDFs are straight: u and Q at the same share of the way through it
        u_DJ = np.clip(left_DJ + part * widths_DJ, 0.0, 1.0)
        q_DJ = np.clip(below_DJ + part * masses_DJ, 0.0, 1.0)
        total += float((weight * widths_DJ * procedure.density(u_DJ) * procedure.cdf(q_DJ)).sum(1).mean())
    return 1.0 - total
