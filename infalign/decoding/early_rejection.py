"""Early rejection: score beginnings, finish only the promising ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from infalign.decoding.by_procedure import selected
from infalign.decoding.strategy import Choose, Draw, Finish, Seen, Step, fraction, whole
from infalign.theory.procedures import Procedure, check_procedure
from infalign.types import InputError


@dataclass(frozen=True)
class EarlyRejection:
    """Draw the first `check_tokens` tokens of n candidates, finish the best `keep` of them, then select.

    The idea is that of speculative rejection (Sun et al., "Fast Best-of-N Decoding via Speculative Rejection",
    arXiv:2410.20290), with one check at a fixed length in place of checks whenever memory runs out. A begun candidate
    is ranked by the reward of its beginning; the ceil(keep n) best go on (the earlier one where rewards tie). One that
    is whole by the check costs nothing more, so it stays in the choice whatever its rank. A finished candidate is the
    completion that would have been drawn at once: with keep = 1 the choice is the procedure's own.

    Args:
        procedure: chooses among the candidates that are whole; it must prefer higher ranks (Best-of-N, best of a
            random N, soft Best-of-N with tilt >= 0, one of the top k, pessimistic), since low ones are given up.
        check_tokens: length of the beginnings, in tokens.
        keep: share of the n candidates that go on, in (0, 1].

    Raises:
        InputError: an argument out of its range, or a procedure that may keep low ranks.

    >>> from infalign import BestOfN
    >>> EarlyRejection(BestOfN(8), check_tokens=16, keep=0.25)
    EarlyRejection(procedure=BestOfN(8), check_tokens=16, keep=0.25)
    """

    procedure: Procedure
    check_tokens: int
    keep: float = 0.5

    def __post_init__(self) -> None:
        check_procedure(self.procedure)
        whole("check_tokens", self.check_tokens, 1)
        fraction("keep", self.keep)
        if self.procedure.monotone not in ("increasing", "constant"):
            raise InputError(
                f"early_rejection gives up the lowest candidates, but {self.procedure!r} may choose them: use it with "
                "best_of_n, random_n, top_of_n, pessimistic_of_n, or soft_best_of_n with tilt >= 0"
            )

    @property
    def n(self) -> int:
        """The procedure's n."""
        return self.procedure.n

    @property
    def width(self) -> int:
        """All candidates are begun at once."""
        return self.procedure.n

    def step(self, seen: Seen) -> Step:
        """Begin all, finish the best, choose."""
        if not seen.candidates:
            return Draw(self.n, tokens=self.check_tokens)
        # a candidate longer than a beginning was finished in an earlier step: then there is only the choice left
        if not any(len(sample.token_ids) > self.check_tokens for sample in seen.candidates):
            # descending, those without a score last; a stable sort keeps the earlier one where rewards tie
            order = np.argsort(-np.where(np.isnan(seen.rewards_N), -np.inf, seen.rewards_N), kind="stable")
            best = sorted(order[: math.ceil(self.keep * self.n)].tolist())
            if begun := [place for place in best if not seen.whole_N[place]]:
                return Finish(tuple(begun))
        return Choose(selected(self.procedure, np.where(seen.whole_N, seen.rewards_N, np.nan), seen.rng))
