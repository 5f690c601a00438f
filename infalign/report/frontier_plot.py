"""What every objective reached: win rate against KL, a line an objective, below the limit of any method."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from infalign.evaluation.matched import interpolated
from infalign.evaluation.summary import GOLD, PROXY
from infalign.evaluation.sweep import CellResult, LimitCurve
from infalign.report.names import procedure_name
from infalign.report.style import LIMIT, LINES, MUTED, new_figure, percent, styled

MARKERS = "osD^vPX*"
"""Of objectives, in order; with colours they repeat only after 24."""


FAINT = "#c3c8ce"
LONGEST = 32
"""Letters of an objective's name in the legend."""


def _aims_elsewhere(cell: CellResult, judge: str, decoder: str) -> bool:
    """Whether what was trained for knows a decoder, and another one; of several objectives, one without a weight."""
    weight = next((row.weight for row in cell.rows if (row.judge, row.label) == (judge, decoder)), np.nan)
    if not np.isnan(weight):
        return weight == 0
    knows = "OfN(" in cell.transform or cell.transform.startswith("direct")
    return knows and cell.procedure != decoder


@styled()
def draw_frontier(cells: Sequence[CellResult], arms: Sequence[str], judge: str, curve: LimitCurve) -> Figure:
    """Every finished cell under one decoder, with intervals; cells of one objective and seed are joined.

    Objectives that aim at another decoder are grey.

    Args:
        cells: of the sweep; those without this decoder are left out.
        arms: the objectives in order, which colours and markers follow.
        judge: whose win rates.
        curve: the decoder, and the limit along KL.
    """
    figure, (axes,) = new_figure(size=(9.0, 5.6))
    if judge != GOLD:
        axes.plot(curve.kl, curve.limit, color=LIMIT, linewidth=1.6, label="limit of any method")
    looks = itertools.cycle(zip(itertools.cycle(LINES), itertools.cycle(MARKERS), strict=False))
    elsewhere: str | None = "aims at another decoder"
    for arm, (color, marker) in zip(arms, looks, strict=False):
        label: str | None = arm if len(arm) <= LONGEST else f"{arm[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
        order = 3
        if any(cell.arm == arm and _aims_elsewhere(cell, judge, curve.decoder) for cell in cells):
            color, label, elsewhere, order = FAINT, elsewhere, None, 1
        for seed in dict.fromkeys(cell.seed for cell in cells if cell.arm == arm):
            points = sorted(
                (cell.kl, row.mean, row.low, row.high)
                for cell in cells
                if cell.arm == arm and cell.seed == seed
                for row in cell.rows
                if (row.judge, row.label) == (judge, curve.decoder) and np.isfinite(cell.kl)
            )
            if not points:
                continue
            kl, win, low, high = np.array(points).T
            if kl.size > 1:
                between = np.linspace(kl[0], kl[-1], 60)
                axes.plot(between, interpolated(kl, win, between), color=color, linewidth=1.0, alpha=0.7, zorder=order)
            bars = None if np.isnan(low).any() else [np.maximum(win - low, 0.0), np.maximum(high - win, 0.0)]
            style = {"markersize": 5.5, "elinewidth": 0.8, "capsize": 0, "zorder": order}
            axes.errorbar(kl, win, yerr=bars, fmt=marker, color=color, label=label, **style)
            label = None
    axes.axhline(0.5, color=MUTED, linewidth=0.8)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("sequence KL to the base policy (nats)")
    judged = {PROXY: "", GOLD: ", judged by the gold reward"}.get(judge, f", judged by {judge}")
    axes.set_ylabel(f"win rate against the base{judged}")
    percent(axes.yaxis)
    axes.set_title(f"Both decoded by {procedure_name(curve.decoder)}")
    figure.legend(loc="outside right upper")
    return figure
