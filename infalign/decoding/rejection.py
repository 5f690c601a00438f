"""Rejection sampling with a threshold in the base policy's quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.calibration.quantile import calibrate
from infalign.decoding.by_procedure import selected
from infalign.decoding.strategy import Choose, Draw, Seen, Step, fraction, whole
from infalign.theory.procedures import BestOfN
from infalign.types import InputError


@dataclass(frozen=True)
class Rejection:
    """Draw until a candidate's calibrated reward reaches `threshold`, at most `n`; then the best of those drawn.

    A candidate's calibrated reward is the mid-rank quantile of its reward among base rewards on the same prompt
    (`calibration.quantile`), so that one threshold means the same on every prompt. theory: without a bound on n the
    decoded policy is `T(q) = q 1[u >= phi] / (1 - Q(phi))` in base quantiles u. With at most n candidates,
    of which each is accepted with probability a = 1 - Q(phi), it is that law with probability 1 - (1-a)^n, else the
    best of n below the threshold.

    Args:
        n: most candidates of a prompt.
        threshold: phi, in (0, 1]: 0.9 accepts what reaches the top tenth of base samples.
        num_references: K base samples that are drawn and scored first where `references` has none for the prompt
            (they count as cost, and are never chosen); 0 refuses such prompts.
        at_once: candidates drawn in one step: faster on a batch, up to at_once - 1 drawn in vain. The first one
            accepted is chosen, so the law is the same.
        references: base rewards by prompt key, e.g. a calibration table's.

    Raises:
        InputError: an argument out of its range; in `step`, a prompt without any base reward.

    >>> Rejection(8, 0.9)
    Rejection(n=8, threshold=0.9, num_references=32, at_once=1)
    """

    n: int
    threshold: float
    num_references: int = 32
    at_once: int = 1
    references: Mapping[str, ArrayLike] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        whole("n", self.n, 1)
        whole("num_references", self.num_references, 0)
        whole("at_once", self.at_once, 1)
        fraction("threshold", self.threshold)

    @property
    def width(self) -> int:
        """Reference samples are drawn in one step as well."""
        return max(min(self.at_once, self.n), self.num_references)

    def step(self, seen: Seen) -> Step:
        """References where there are none, then candidates until one is accepted."""
        references = self._references(seen)
        if references is None:
            return Draw(self.num_references, reference=True)
        if seen.candidates:
            accepted = np.flatnonzero(calibrate([seen.rewards_N], [references])[0] >= self.threshold)
            if accepted.size:
                return Choose(int(accepted[0]))
        left = self.n - len(seen.candidates)
        if left:
            return Draw(min(self.at_once, left))
        return Choose(selected(BestOfN(self.n), seen.rewards_N, seen.rng))

    def _references(self, seen: Seen) -> NDArray[np.float64] | None:
        """The prompt's scored base rewards; None when they are still to be drawn."""
        held = self.references.get(seen.prompt.key)
        given = seen.references_K if held is None else np.asarray(held, dtype=np.float64)
        if given is None and self.num_references:
            return None
        scored = np.empty(0) if given is None else given[~np.isnan(given)]
        if not scored.size:
            raise InputError(
                f"rejection needs base rewards, and the prompt {str(seen.prompt.content)[:80]!r} has none: calibrate "
                "it, or set num_references to draw some (and look at the reward if those have no score)"
            )
        return scored
