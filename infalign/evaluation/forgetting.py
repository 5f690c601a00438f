"""What a policy has forgotten: how well it still predicts texts that it was not trained on, beside its base."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class TextFit:
    """Cross-entropy on a file of texts in nats a token; `exp` of it is the perplexity.

    Attributes:
        name: of the texts.
        texts, tokens: how many were read.
        base, policy: of each model.
        error: standard error of their difference, over texts.
    """

    name: str
    texts: int
    tokens: int
    base: float
    policy: float
    error: float

    @property
    def lost(self) -> float:
        """Nats a token that the policy predicts worse than its base."""
        return self.policy - self.base

    def __str__(self) -> str:
        error = "" if math.isnan(self.error) else f" \N{PLUS-MINUS SIGN} {self.error:.4f}"
        return (
            f"held-out texts {self.name}: {self.policy:.4f} nats a token, the base {self.base:.4f} "
            f"(lost {self.lost:.4f}{error}), {self.texts} texts, {self.tokens:,} tokens"
        )


def text_fit(name: str, base_T: Array, policy_T: Array, tokens_T: Array) -> TextFit:
    """From the summed log-probabilities of T texts and their tokens.

    The error is that of a ratio of sums, linearised: whole texts are drawn, not tokens.

    >>> text_fit("two", np.array([-4.0, -2.0]), np.array([-6.0, -3.0]), np.array([2.0, 1.0]))
    TextFit(name='two', texts=2, tokens=3, base=2.0, policy=3.0, error=0.0)
    """
    total, count = float(tokens_T.sum()), tokens_T.size
    lost_T = base_T - policy_T
    apart_T = lost_T - lost_T.sum() / total * tokens_T
    error = math.sqrt(count / (count - 1) * float(apart_T @ apart_T)) / total if count > 1 else math.nan
    return TextFit(name, count, int(total), -float(base_T.sum()) / total, -float(policy_T.sum()) / total, error)
