"""Gold wins of Best-of-N against N, of base and policy."""

from __future__ import annotations

from matplotlib.figure import Figure

from infalign.evaluation.deployment import Deployment
from infalign.report.style import BASE, MUTED, POLICY, new_figure, percent, styled

DEPLOYMENT_CAPTION = (
    "How often Best-of-N by the reward beats, under the gold reward, the base as the recipe decodes it: the same "
    "opponent for every N. The circle is the N that wins most. A curve that falls means that more candidates find "
    "answers which the reward likes and gold does not."
)


@styled()
def draw_deployment(found: Deployment) -> Figure:
    """Both curves with their intervals, and the best N of each.

    Args:
        found: what was measured.
    """
    figure, (axes,) = new_figure(size=(6.4, 4.0))
    for label, curve, color in (("base", found.base, BASE), ("policy", found.policy, POLICY)):
        axes.fill_between(curve.n, curve.low, curve.high, color=color, alpha=0.18, linewidth=0)
        axes.plot(curve.n, curve.mean, color=color, marker=".", label=label)
        at = curve.n.index(curve.best)
        axes.plot(curve.best, curve.mean[at], color=color, marker="o", markersize=10, fillstyle="none")
    axes.axhline(0.5, color=MUTED, linewidth=1.0, linestyle="--")
    axes.set_xscale("log", base=2)
    shown = [n for n in found.base.n if n & (n - 1) == 0]
    axes.set_xticks(shown, [str(n) for n in shown])
    axes.minorticks_off()
    axes.set_xlabel("N, candidates")
    axes.set_title("Wins under the gold reward")
    percent(axes.yaxis)
    axes.legend(loc="best")
    return figure
