"""The mixture of several models' logits: `log pi(a | s) = sum_k w_k log pi_k(a | s) + constant`, token by token.

For experts that were trained from one base under one KL penalty it is what a joint training aims at (design: the exact
optimum of a weighted sum of their objectives), up to its normalisation: theirs is over whole completions, this one is
over the next token. `infalign.merging.gap` measures the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infalign.types import InputError


@dataclass(frozen=True)
class LogitMixture:
    """Models of one vocabulary with a weight each. Weights that do not sum to one sharpen or flatten the mixture."""

    models: tuple[Any, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.models) != len(self.weights) or not self.models:
            raise InputError(f"a mixture needs a weight for each model: {len(self.weights)} for {len(self.models)}")
        sizes = {one.get_input_embeddings().weight.shape[0] for one in self.models}
        if len(sizes) > 1:
            raise InputError(f"models of a mixture must have one vocabulary, these have {sorted(sizes)} tokens")

    @property
    def device(self) -> torch.device:
        """The models' device."""
        return self.models[0].device

    def mixed(self, logits: Sequence[Tensor]) -> Tensor:
        """`sum_k w_k log softmax(z_k)` of logits (..., V): unnormalised log-probabilities, float32."""
        parts = (w * one.float().log_softmax(-1) for w, one in zip(self.weights, logits, strict=True))
        return torch.stack(tuple(parts)).sum(0)
