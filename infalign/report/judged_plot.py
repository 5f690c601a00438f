"""What the proxy's quantiles are worth under the gold reward."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from infalign.report.style import BASE, GOLD, MUTED, new_figure, percent, styled


@styled()
def draw_judged(h_J: ArrayLike, error_J: ArrayLike) -> Figure:
    """The chance to beat the decoded base under gold by the proxy's quantile, with its standard error.

    Args:
        h_J, error_J: (J,) on levels of equal base mass, ascending in the proxy.
    """
    h, error = np.asarray(h_J, dtype=np.float64), np.nan_to_num(np.asarray(error_J, dtype=np.float64))
    u_J = (np.arange(h.size) + 0.5) / h.size
    figure, (axes,) = new_figure(1, 1, (6.0, 3.6))
    low, high = np.clip([h - error, h + error], 0.0, 1.0)
    axes.fill_between(u_J, low, high, color=GOLD, alpha=0.25, linewidth=0)
    axes.plot(u_J, h, color=GOLD)
    axes.axhline(0.5, color=MUTED, linewidth=1.0, linestyle="--")
    top = int(np.argmax(h))
    if top < h.size - 1:
        axes.axvline(u_J[top], color=BASE, linewidth=1.0, linestyle=":")
    axes.set_title("Wins under the gold reward")
    axes.set_xlabel("quantile of the reward among base samples")
    percent(axes.yaxis)
    return figure
