"""The transform that was trained with, and the policy that it aims for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from infalign.report.names import transform_name
from infalign.report.style import MUTED, POLICY, new_figure, styled

Floats = NDArray[np.float64]


@styled()
def draw_transform(transform: Any, density: Callable[[Floats], Floats], title: str = "") -> Figure:
    """Phi(u) and q(u) side by side.

    Args:
        transform: u -> Phi(u) on (0, 1).
        density: u -> q(u), the density over base quantiles of the policy that it aims for.
        title: of the left panel; unset: the transform's name.
    """
    figure, (left, right) = new_figure(1, 2, (6.4, 3.6))
    u_Q = quantile_grid()
    left.plot(u_Q, transform(u_Q), color=POLICY)
    left.set_title(title or f"Φ: {transform_name(transform)}")
    left.set_ylabel("transformed reward Φ(u)")
    q_Q = density(u_Q)
    right.axhline(1.0, color=MUTED, linewidth=1.2, linestyle="--", label="base")
    right.fill_between(u_Q, q_Q, color=POLICY, alpha=0.15, linewidth=0)
    right.plot(u_Q, q_Q, color=POLICY, label="aim")
    right.set_title("Policy it aims for")
    right.set_ylabel("density q(u)")
    right.set_ylim(bottom=0.0)
    right.legend(loc="upper left" if q_Q[-1] > q_Q[0] else "lower right")
    for axes in (left, right):
        axes.set_xlabel("calibrated reward u")
        axes.set_xlim(0.0, 1.0)
    return figure


def quantile_grid(count: int = 400) -> Floats:
    """(Q,) quantiles inside (0, 1), where every transform is finite.

    >>> quantile_grid(3).tolist()
    [0.002, 0.5, 0.998]
    """
    return np.linspace(0.002, 0.998, count)
