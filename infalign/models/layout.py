"""Weights in the order in which a CPU multiplies a few rows by them fastest.

One token a row makes products of 16 to 150 rows with every weight. In float32 the CPU's BLAS does these 10 to 30 %
faster when the weight lies column by column, and larger products as fast either way (recipes/LOG.md has the numbers).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def lay_columnwise(model: Any) -> None:
    """Lay the float32 CPU weights of linear layers out column by column, in place; values and shapes stay.

    For models that are only run: transformers fails to save tied weights that are not contiguous.
    """
    for weight in _weights(model):
        weight.data = _columnwise(weight)


@contextmanager
def columnwise(model: Any) -> Iterator[None]:
    """Within, `model` has copies of its weights laid out column by column; afterwards the originals, untouched."""
    before = [(weight, weight.data) for weight in _weights(model)]
    try:
        for weight, _ in before:
            weight.data = _columnwise(weight)
        yield
    finally:
        for weight, data in before:
            weight.data = data


def _weights(model: Any) -> list[torch.Tensor]:
    found = {id(module.weight): module.weight for module in model.modules() if type(module) is nn.Linear}
    return [
        weight
        for weight in found.values()
        if weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and weight.is_contiguous()
        and weight.dim() == 2
    ]


def _columnwise(weight: torch.Tensor) -> torch.Tensor:
    return weight.data.t().contiguous().t()  # the same (out, in), with strides (1, out)
