"""Does a reward model's margin mean what Bradley and Terry say it means? The reliability diagram of held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from infalign.evaluation.pairs import Bin
from infalign.report.style import INK, MUTED, POLICY, new_figure, percent, styled


@styled()
def draw_reliability(bins: Sequence[Bin], pairs: int, ece: float) -> Figure:
    """How often the favoured side is the chosen one, against its probability; point areas follow the pairs in a bin.

    Args:
        bins: of `evaluation.pairs.reliability`.
        pairs: how many there are in all.
        ece: the expected calibration error.
    """
    figure, (axes,) = new_figure(size=(5.6, 4.6))
    axes.plot([0.5, 1.0], [0.5, 1.0], color=INK, linewidth=1.0, linestyle="--", label="calibrated")
    axes.axhline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
    places, shares = [one.probability for one in bins], [one.right for one in bins]
    below = [one.right - one.right_low for one in bins]
    above = [one.right_high - one.right for one in bins]
    axes.errorbar(places, shares, yerr=[below, above], fmt="none", ecolor=POLICY, alpha=0.5, linewidth=1.4)
    sizes = [20.0 + 500.0 * one.count / pairs for one in bins]
    axes.scatter(places, shares, s=sizes, color=POLICY, zorder=3, label=f"{pairs} held-out pairs, area ~ pairs")
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(min(0.4, *shares) - 0.02 if shares else 0.4, 1.02)
    percent(axes.xaxis)
    percent(axes.yaxis)
    axes.set_xlabel("probability of the side with the higher score")
    axes.set_ylabel("how often it is the chosen one")
    axes.set_title(f"Reliability: expected calibration error {ece:.3f}")
    axes.legend(loc="upper left")
    return figure
