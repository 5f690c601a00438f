"""What a number of the recipe does (base samples, rollouts, a learning rate): attainment against it."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from infalign.evaluation.summary import PROXY
from infalign.evaluation.sweep import CellResult
from infalign.report.style import LINES, new_figure, styled

LONGEST = 44
FEWEST = 3
"""Values that a key needs for a plot of its own."""
WIDE = 8.0
"""Largest over smallest value, from where the axis is logarithmic."""
NOT_PLOTTED = ("target_kl", "beta", "seed", "n")
"""Keys that have plots of their own, or none."""


def plotted_keys(cells: Sequence[CellResult]) -> list[str]:
    """The grid's keys whose values are at least three different numbers."""
    names = dict.fromkeys(name for cell in cells for name in cell.varied if name not in NOT_PLOTTED)
    return [name for name in names if len(_numbers(cells, name)) >= FEWEST]


def _numbers(cells: Sequence[CellResult], name: str) -> set[float]:
    values = [cell.varied.get(name) for cell in cells]
    return {float(one) for one in values if isinstance(one, (int, float)) and not isinstance(one, bool)}


def _without(cell: CellResult, name: str, targets: int) -> str:
    """What a cell has in common with those that differ in one key and the seed; with its KL where there are more."""
    words = f" {cell.arm} ".replace(f" {name}={cell.varied[name]} ", " ").strip()
    own = words if words not in ("", f"{name}={cell.varied[name]}") else "all"
    return f"{own}, {cell.varied['target_kl']:g} nats" if targets > 1 else own


def _natural(label: str) -> list[str | float]:
    """Sorts numbers in a text by their value."""
    return [float(part) if at % 2 else part for at, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", label))]


@styled()
def draw_key(cells: Sequence[CellResult], name: str) -> Figure:
    """Attainment of every cell under the decoder that it was trained for; a line joins the means over seeds.

    Args:
        cells: finished ones.
        name: one of `plotted_keys`.
    """
    figure, (axes,) = new_figure(size=(9.0, 5.0))
    points: dict[str, dict[float, list[float]]] = {}
    targets = len({cell.varied.get("target_kl") for cell in cells})
    for cell in cells:
        row = next((row for row in cell.rows if (row.judge, row.label) == (PROXY, cell.procedure)), None)
        value = cell.varied.get(name)
        if row is not None and isinstance(value, (int, float)):
            points.setdefault(_without(cell, name, targets), {}).setdefault(float(value), []).append(row.attainment)
    for at, (label, by_value) in enumerate(sorted(points.items(), key=lambda one: _natural(one[0]))):
        color, style = LINES[at % len(LINES)], "-" if at < len(LINES) else "--"
        values = sorted(by_value)
        short = label if len(label) <= LONGEST else f"{label[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"
        axes.plot(values, [float(np.mean(by_value[one])) for one in values], style, color=color, label=short)
        for value in values:
            axes.plot([value] * len(by_value[value]), by_value[value], "o", color=color, markersize=4, alpha=0.8)
    values = sorted(_numbers(cells, name))
    if values[0] > 0 and values[-1] / values[0] >= WIDE:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(values, [f"{one:g}" for one in values])
    axes.set_xlabel(name)
    axes.set_ylabel("attainment at the measured KL")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
