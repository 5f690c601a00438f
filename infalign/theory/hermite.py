"""Quintic Hermite interpolation: a smooth monotone curve through values, slopes and curvatures known at nodes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A monotone curve: the piecewise quintic, kept between its nodes' values.

    It has the given value, first and second derivative at each ascending node; all (Q,).
    With `from_top` the nodes are distances 1 - u, and derivatives are with respect to them: a curve that moves
    within less than one rounding of u = 1 stays resolved.

    >>> node = np.array([0.0, 1.0])
    >>> float(Curve(node, node**3, 3 * node**2, 6 * node)(np.array(0.5)))
    0.125
    """

    node: Floats
    value: Floats
    slope: Floats
    bend: Floats
    from_top: bool = False

    def __call__(self, u: Floats) -> Floats:
        """The curve at u (any shape) within the nodes."""
        return self._evaluate(1 - u if self.from_top else u, 0)

    def derivative(self, u: Floats) -> Floats:
        """The curve's slope at u (any shape)."""
        return -self._evaluate(1 - u, 1) if self.from_top else self._evaluate(u, 1)

    def at_place(self, place: Floats) -> Floats:
        """The curve at places in the nodes' own coordinate."""
        return self._evaluate(place, 0)

    def slope_at_place(self, place: Floats) -> Floats:
        """The derivative with respect to the nodes' own coordinate."""
        return self._evaluate(place, 1)

    def _evaluate(self, place: Floats, order: int) -> Floats:
        """Horner's rule in x = (place - left node)/width on each place's cell."""
        cell = np.clip(np.searchsorted(self.node, place, side="right") - 1, 0, len(self.node) - 2)
        width = self.node[cell + 1] - self.node[cell]
        x = (place - self.node[cell]) / width
        d0, d1 = self.slope[cell] * width, self.slope[cell + 1] * width
        b0, b1 = self.bend[cell] * width**2 / 2, self.bend[cell + 1] * width**2 / 2
        rise = self.value[cell + 1] - self.value[cell]
        c3 = 10 * rise - 6 * d0 - 4 * d1 - 3 * b0 + b1
        c4 = -15 * rise + 8 * d0 + 7 * d1 + 3 * b0 - 2 * b1
        c5 = 6 * rise - 3 * d0 - 3 * d1 - b0 + b1
        if order == 0:
            left, right = self.value[cell], self.value[cell + 1]
            inner = left + x * (d0 + x * (b0 + x * (c3 + x * (c4 + x * c5))))
            return np.clip(inner, np.minimum(left, right), np.maximum(left, right))
        return (d0 + x * (2 * b0 + x * (3 * c3 + x * (4 * c4 + x * 5 * c5)))) / width
