"""Trained for N, decoded with N': a matrix for each KL, measured above exact."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from infalign.evaluation.transfer import Transfer
from infalign.report.style import INK, MUTED, new_figure, styled

FAR = 0.05
"""Behind the best of a column by this much, a box has the deepest colour."""
_BEHIND = LinearSegmentedColormap.from_list("behind", ["#ddf4e4", "#ffffff", "#f6d5c3"])
NAMES = {"BestOfN": "Best-of", "WorstOfN": "Worst-of"}


@styled()
def draw_transfer(boxes: Sequence[Transfer]) -> Figure:
    """A panel for each target KL; a row is what was trained for, a column what decodes; the column's best is bold.

    Args:
        boxes: of one family and kind.
    """
    targets = sorted({box.target_kl for box in boxes})
    trained = sorted({box.trained for box in boxes})
    decoded = sorted({box.decoded for box in boxes})
    size = (1.1 + 0.82 * len(decoded), 1.5 + 0.62 * len(trained))
    figure, panels = new_figure(len(targets), 1, (size[0], size[1] * len(targets)))
    for axes, target in zip(panels, targets, strict=True):
        _draw_panel(axes, [box for box in boxes if box.target_kl == target], trained, decoded)
    return figure


def _draw_panel(axes: Axes, boxes: Sequence[Transfer], trained: Sequence[int], decoded: Sequence[int]) -> None:
    name = NAMES[boxes[0].family]
    win = np.full((len(trained), len(decoded)), np.nan)
    for box in boxes:
        win[trained.index(box.trained), decoded.index(box.decoded)] = box.win
    best = np.nanmax(win, axis=0)
    axes.imshow(np.clip(best - win, 0.0, FAR), cmap=_BEHIND, vmin=0.0, vmax=FAR, aspect="auto")
    for box in boxes:
        row, column = trained.index(box.trained), decoded.index(box.decoded)
        weight = "bold" if box.win == best[column] else "normal"
        axes.text(column, row - 0.16, f"{box.win:.3f}", ha="center", va="center", fontsize=10, fontweight=weight)
        known = "" if np.isnan(box.exact) else f"{box.exact:.3f}"
        axes.text(column, row + 0.22, known, ha="center", va="center", fontsize=8.5, color=MUTED)
    axes.set_xticks(range(len(decoded)), [f"{name}-{n}" for n in decoded], fontsize=9)
    kls = {box.trained: box.kl for box in boxes}
    labels = [f"N = {n}" + (f"\n{kls[n]:.2f} nats" if n in kls else "") for n in trained]
    axes.set_yticks(range(len(trained)), labels, fontsize=9)
    axes.grid(False)
    axes.tick_params(length=0)
    axes.set_title(f"{boxes[0].target_kl:g} nats asked", color=INK)
    axes.set_xlabel("decoded by")
    axes.set_ylabel("trained for")
