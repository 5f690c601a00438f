"""How every plot looks: colours, sizes, and the way from a figure to the bytes of a PNG.

Colours are chosen so that the page can turn the lightness of a plot around for dark mode and keep its hues.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, MUTED, GRID = "#1f2328", "#6e7781", "#e4e7eb"
POLICY, BASE, LIMIT, GOLD = "#1f6feb", "#d4711c", "#1f2328", "#8250df"
OTHERS = ("#1a7f64", "#bf3989", "#9a6700")
"""Of the rewards of further terms."""
LINES = ("#1f6feb", "#d4711c", "#1a7f37", "#8250df", "#cf222e", "#0e7490")
"""Colours of further lines, in order."""

_RC: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelsize": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "lines.linewidth": 2.0,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 10,
    "text.color": INK,
}


def styled() -> Any:
    """A decorator for functions that draw: matplotlib's settings are ours while they run, and only then."""
    return rc_context(_RC)


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.2)) -> tuple[Figure, list[Axes]]:
    """A figure of `size` inches and its axes, row by row."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.ravel())


def percent(axis: Any) -> None:
    """Show an axis of shares in per cent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100.0 * value:.6g} %"))


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as PNG bytes, the same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def smooth(values: Any, window: int) -> np.ndarray:
    """Centred moving means of a (L,) series; at the ends the window is cut. A window of 1 changes nothing.

    >>> smooth([0.0, 3.0, 6.0], 3).tolist()
    [1.5, 3.0, 4.5]
    """
    row = np.asarray(values, dtype=np.float64)
    half = window // 2
    return np.array([np.nanmean(row[max(0, at - half) : at + half + 1]) for at in range(row.size)])
