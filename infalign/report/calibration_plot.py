"""Is the calibration right? The ranks of held-out reference rewards among the others are flat when it is.

The randomised rank of a reward among h exchangeable others is exactly uniform, ties included. The others are shared
within a prompt, so counts per bin vary more than binomially: the h + 1 slots' masses are Dirichlet(1, ..., 1), and of m
draws a bin of mass p holds a number with variance `m p (1 - p) (h + 1 + m)/(h + 2)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from infalign.report.style import INK, MUTED, POLICY, new_figure, styled
from infalign.runtime.seeds import stream

Floats = NDArray[np.float64]

BINS = 20
COVERAGE = 0.95


@dataclass(frozen=True)
class HeldOutRanks:
    """Ranks in [0, 1] of each prompt's second half of rewards among its first half.

    `heights` (bins,) are shares relative to flat, which is 1; `band` is the half-width that 95 % of bins keep within.
    """

    heights: Floats
    band: float
    values: int
    prompts: int


def held_out_ranks(rewards_PK: Sequence[Floats], seed: int = 0) -> HeldOutRanks | None:
    """The histogram of held-out ranks, or None when no prompt has two scored samples.

    Args:
        rewards_PK: reference rewards, in the order in which they were drawn; NaN is "no score"; rows may be ragged.
        seed: of the random order of ties.
    """
    rows = [row[~np.isnan(row)] for row in rewards_PK]
    halves = [(row[: row.size // 2], row[row.size // 2 :]) for row in rows if row.size >= 2]
    if not halves:
        return None
    rng = stream(seed, "held-out ranks")
    ranks = np.concatenate([_ranks(first, second, rng) for first, second in halves])
    bins = min(BINS, min(first.size for first, _ in halves) + 1)
    share = 1.0 / bins
    # the variance of a bin's count, added up over prompts: m p (1 - p) (h + 1 + m) / (h + 2), see above
    variance = sum(
        second.size * share * (1.0 - share) * (first.size + 1 + second.size) / (first.size + 2)
        for first, second in halves
    )
    counts = np.histogram(ranks, bins=bins, range=(0.0, 1.0))[0]
    flat = ranks.size * share
    half_width = NormalDist().inv_cdf(0.5 + COVERAGE / 2) * float(np.sqrt(variance)) / flat
    return HeldOutRanks(counts / flat, half_width, ranks.size, len(halves))


def _ranks(first_H: Floats, second_M: Floats, rng: np.random.Generator) -> Floats:
    """(M,) ranks among H others: the slot among H + 1, ties in random order, and a random place in the slot."""
    others = np.sort(first_H)
    below, up_to = (np.searchsorted(others, second_M, side=side) for side in ("left", "right"))
    # a reward tied with t others may take any of t + 1 slots; a continuous place among them is slot and place in it
    return (below + rng.random(second_M.size) * (up_to - below + 1)) / (others.size + 1)


@styled()
def draw_calibration(ranks: HeldOutRanks) -> Figure:
    """The histogram of held-out ranks with the band that flat ranks keep within."""
    figure, (axes,) = new_figure()
    bins = ranks.heights.size
    edges = np.linspace(0.0, 1.0, bins + 1)
    label = f"where {COVERAGE:.0%} of bars end when it is right".replace("%", " %")
    axes.axhspan(1.0 - ranks.band, 1.0 + ranks.band, color=MUTED, alpha=0.2, linewidth=0, label=label)
    axes.stairs(ranks.heights, edges, fill=True, color=POLICY, alpha=0.22)
    axes.stairs(ranks.heights, edges, color=POLICY, linewidth=1.8)
    axes.axhline(1.0, color=INK, linewidth=1.0, linestyle="--")
    axes.set_xlim(0.0, 1.0)
    axes.set_ylim(0.0, max(1.5, 1.15 * float(ranks.heights.max()), 1.15 * (1.0 + ranks.band)))
    axes.set_xlabel("calibrated reward of held-out base samples")
    axes.set_ylabel("share, relative to flat")
    axes.set_title("Calibration on held-out base samples")
    axes.legend(loc="upper right")
    return figure
