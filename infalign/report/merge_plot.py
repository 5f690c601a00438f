"""DAM's coefficients: how much of each parent is in which layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from infalign.report.style import LINES, MUTED, new_figure, styled

_LAYER = re.compile(r"\.(\d+)\.")


def by_layer(coefficients: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """(S, columns) coefficients of each layer, all its parameters together; what has no number keeps its name.

    >>> list(by_layer({"m.layers.0.q.weight": np.ones((2, 1, 3)), "m.embed.weight": np.ones((2, 1, 4))}))
    ['0', 'embed']
    """
    found: dict[str, list[NDArray[np.float32]]] = {}
    for name, c_S in coefficients.items():
        number = _LAYER.search(name)
        label = number[1] if number else name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        found.setdefault(label, []).append(c_S.reshape(len(c_S), -1))
    return {label: np.concatenate(rows, axis=1) for label, rows in found.items()}


@styled()
def draw_coefficients(coefficients: Mapping[str, NDArray[np.float32]], parents: Sequence[str]) -> Figure:
    """Mean coefficient of each parent by layer, with the tenth to the ninetieth percentile of its columns.

    Args:
        coefficients: (S, ...) by parameter.
        parents: S names.
    """
    figure, (axes,) = new_figure(size=(9.0, 4.6))
    layers = by_layer(coefficients)
    places = np.arange(len(layers))
    for at, name in enumerate(parents):
        rows = [columns_SC[at] for columns_SC in layers.values()]
        low, high = (np.array([np.quantile(row, level) for row in rows]) for level in (0.1, 0.9))
        color = LINES[at % len(LINES)]
        axes.plot(places, [row.mean() for row in rows], "o-", color=color, markersize=4, label=name)
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
    axes.axhline(1.0 / len(parents), color=MUTED, linewidth=0.8, linestyle=":")
    axes.set_xticks(places, list(layers), rotation=45, ha="right")
    axes.set_xlabel("layer")
    axes.set_ylabel("coefficient")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
