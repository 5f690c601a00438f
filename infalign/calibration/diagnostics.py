"""What can be wrong with a calibration, and what its size costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.quantile import calibrate
from infalign.runtime.seeds import stream

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Diagnostics:
    """Shares are of samples; `uniformity` is a p-value: small means that the samples were not drawn alike.

    `cost` is the win rate that this K is expected to lose against exact calibration, at KL `cost_kl` nats; None when
    it was not asked for.
    """

    prompts: int
    samples: int
    duplicates: float
    ties: float
    clipped: float
    unscored: float
    uniformity: float
    cost: float | None = None
    cost_kl: float | None = None

    def warnings(self) -> list[str]:
        """What deserves a second look, each with what to do."""
        found = []
        if self.duplicates > 0.5:
            found.append(f"{self.duplicates:.0%} of completions are duplicates: raise temperature or the length limit")
        if self.ties > 0.5:
            found.append(f"{self.ties:.0%} of rewards are tied: a finer reward leaves more to gain")
        if self.unscored > 0.1:
            found.append(f"{self.unscored:.0%} of completions have no score: look at the reward")
        if self.uniformity < 0.001:
            found.append(f"reference samples were not drawn alike (p = {self.uniformity:.1g}): recalibrate")
        return found


def duplicate_rate(texts_PK: Sequence[Sequence[str]]) -> float:
    """The share of samples that repeat an earlier sample of their prompt.

    >>> duplicate_rate([["a", "a", "b", "c"]])
    0.25
    """
    total = sum(map(len, texts_PK))
    return (total - sum(len(set(row)) for row in texts_PK)) / max(total, 1)


def tie_rate(rewards_PK: Sequence[Array]) -> float:
    """The chance that two samples of one prompt have equal rewards, averaged over prompts.

    >>> tie_rate([np.array([1.0, 1.0, 2.0])])
    0.3333333333333333
    """
    rates = []
    for row in rewards_PK:
        scored = row[~np.isnan(row)]
        if scored.size > 1:
            counts = np.unique(scored, return_counts=True)[1]
            # ordered pairs of two different samples that are equal, over all ordered pairs
            rates.append(float((counts * (counts - 1)).sum() / (scored.size * (scored.size - 1))))
    return float(np.mean(rates)) if rates else 0.0


def uniformity(rewards_PK: Sequence[Array], rounds: int = 199, seed: int = 0) -> float:
    """A permutation p-value for "the first and the second half of each prompt's samples were drawn alike".

    The first half is calibrated against the second; the statistic is the Kolmogorov-Smirnov distance of those
    quantiles from the ones that a random split gives. Exact under exchangeability, ties included.
    """
    rows = [row[~np.isnan(row)] for row in rewards_PK]
    rows = [row for row in rows if row.size >= 4]
    if not rows:
        return 1.0
    rng = stream(seed, "uniformity")
    observed = _split_quantiles(rows)
    shuffled = [_split_quantiles([rng.permutation(row) for row in rows]) for _ in range(rounds)]
    grid = np.linspace(0.0, 1.0, 101)
    # (rounds, 101) distribution functions of the quantiles on a grid
    curves = np.array([np.searchsorted(np.sort(values), grid, side="right") / values.size for values in shuffled])
    observed_curve = np.searchsorted(np.sort(observed), grid, side="right") / observed.size
    # the observed split is one of rounds + 1 exchangeable ones: it is part of the centre and of the count below
    centre = (curves.sum(0) + observed_curve) / (rounds + 1)
    distance = np.abs(observed_curve - centre).max()
    return float((1 + (np.abs(curves - centre).max(1) >= distance - 1e-12).sum()) / (rounds + 1))


def _split_quantiles(rows: Sequence[Array]) -> Array:
    halves = [(row[: row.size // 2], row[row.size // 2 :]) for row in rows]
    return np.concatenate([calibrate([first], [second])[0] for first, second in halves])
