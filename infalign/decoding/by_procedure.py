"""A rank-based procedure as a strategy: n candidates at once, and the procedure selects."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infalign.decoding.strategy import Choose, Draw, Seen, Step, Strategy
from infalign.theory.procedures import Procedure, check_procedure


@dataclass(frozen=True)
class ByProcedure:
    """Draw `procedure.n` candidates and let the procedure choose: Best-of-N, Worst-of-N, k-th, soft, random N.

    >>> from infalign import BestOfN
    >>> ByProcedure(BestOfN(4))
    BestOfN(4)
    """

    procedure: Procedure

    def __post_init__(self) -> None:
        check_procedure(self.procedure)

    def __repr__(self) -> str:
        return repr(self.procedure)

    @property
    def n(self) -> int:
        """The procedure's n."""
        return self.procedure.n

    @property
    def width(self) -> int:
        """All candidates are drawn at once."""
        return self.procedure.n

    def step(self, seen: Seen) -> Step:
        """Draw all, then choose."""
        if not seen.candidates:
            return Draw(self.n)
        return Choose(selected(self.procedure, seen.rewards_N, seen.rng))


def selected(procedure: Procedure, rewards_N: NDArray[np.float64], rng: np.random.Generator) -> int | None:
    """The place that a procedure selects of one prompt's rewards; None when none has a score."""
    if np.isnan(rewards_N).all():
        return None
    return int(procedure.select(rewards_N[None], rng)[0])


def as_strategy(one: Procedure | Strategy) -> Strategy:
    """A procedure as the strategy it stands for; a strategy as it is."""
    return ByProcedure(one) if isinstance(one, Procedure) else one
