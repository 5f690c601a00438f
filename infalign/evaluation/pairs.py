"""How good a reward model is on held-out preference pairs: accuracy, calibration of its probabilities, length, ties.

The Bradley-Terry model (Bradley and Terry 1952) reads the margin m = r(chosen) - r(rejected) as
P(chosen is preferred) = sigmoid(m). A pair is seen from both sides, so its probability is max(p, 1-p) and the question
is how often the side that it favours is the chosen one: a reliability diagram on [1/2, 1].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

from infalign.evaluation.winrate import WinRate, bootstrap_interval
from infalign.types import InputError

Array = NDArray[np.float64]

BINS = 10
_LIKE = 0.1  # two lengths are alike when they differ by at most this share of the longer


@dataclass(frozen=True)
class Bin:
    """Pairs whose favoured side has a probability in [low, high): their number, mean probability, share that is right.

    `right_low`, `right_high`: 95 % interval of that share (Wilson 1927).
    """

    low: float
    high: float
    count: int
    probability: float
    right: float
    right_low: float
    right_high: float


@dataclass(frozen=True)
class PairQuality:
    """What held-out pairs say of a reward model.

    Attributes:
        pairs, prompts: how many were scored.
        accuracy: share of pairs whose chosen side scores higher, ties counted half; interval over prompts.
        log_loss: mean of -log sigmoid(margin), in nats; log 2 = 0.693 is chance.
        ece: expected calibration error of the favoured side's probability, over `bins` (Naeini et al., AAAI 2015).
        bins: the reliability diagram.
        tie_rate: share of pairs that score the same.
        longer_preferred: how often the reward prefers the longer side, and how often people did (`longer_chosen`).
        length_correlation: Spearman's of margin and length difference.
        like_length_accuracy, like_length_pairs: accuracy on pairs of about equal length, and how many there are.
    """

    pairs: int
    prompts: int
    accuracy: WinRate
    log_loss: float
    ece: float
    bins: tuple[Bin, ...]
    tie_rate: float
    longer_preferred: float
    longer_chosen: float
    length_correlation: float
    like_length_accuracy: float
    like_length_pairs: int


def pair_quality(
    chosen_P: ArrayLike,
    rejected_P: ArrayLike,
    chosen_lengths_P: ArrayLike,
    rejected_lengths_P: ArrayLike,
    prompts_P: Sequence[str],
    *,
    confidence: float = 0.95,
) -> PairQuality:
    """Measure a reward on P held-out pairs.

    Args:
        chosen_P, rejected_P: finite scores.
        chosen_lengths_P, rejected_lengths_P: lengths of the completions, in any one unit.
        prompts_P: the prompt of each pair: pairs of one prompt are one cluster of the interval.
        confidence: of the accuracy's interval.

    Raises:
        InputError: no pairs, shapes that differ, or scores that are not finite.
    """
    chosen, rejected, longer, shorter = (
        np.asarray(x, dtype=np.float64) for x in (chosen_P, rejected_P, chosen_lengths_P, rejected_lengths_P)
    )
    _check(chosen, rejected, longer, shorter, prompts_P)
    margin, excess = chosen - rejected, longer - shorter
    right = np.where(margin == 0.0, 0.5, (margin > 0.0).astype(np.float64))
    like = np.abs(excess) <= _LIKE * np.maximum(longer, shorter)
    different = (excess != 0.0) & (margin != 0.0)
    bins = reliability(margin)
    return PairQuality(
        pairs=margin.size,
        prompts=len(set(prompts_P)),
        accuracy=clustered_share(right, prompts_P, confidence),
        log_loss=float(-special.log_expit(margin).mean()),
        ece=float(sum(one.count * abs(one.right - one.probability) for one in bins) / margin.size),
        bins=bins,
        tie_rate=float((margin == 0.0).mean()),
        longer_preferred=_mean((margin > 0.0) == (excess > 0.0), different),
        longer_chosen=_mean(excess > 0.0, excess != 0.0),
        length_correlation=_spearman(margin, excess),
        like_length_accuracy=_mean(right, like),
        like_length_pairs=int(like.sum()),
    )


def clustered_mean(values_P: Array, clusters_P: Sequence[str], confidence: float = 0.95, seed: int = 0) -> WinRate:
    """Mean over P values with a bootstrap interval over clusters (values of one cluster are averaged first).

    The mean is over clusters too, so that a prompt with many pairs counts once.

    >>> float(clustered_mean(np.array([1.0, 0.0, 1.0]), ["a", "a", "b"]).mean)
    0.75
    """
    _, which = np.unique(np.asarray(clusters_P), return_inverse=True)
    means = np.bincount(which, values_P) / np.bincount(which)
    low, high = bootstrap_interval(means, confidence, seed)
    return WinRate(float(means.mean()), float(max(low, 0.0)), float(min(high, 1.0)), means)


def clustered_share(values_P: Array, clusters_P: Sequence[str], confidence: float = 0.95) -> WinRate:
    """A share, averaged over clusters, with Wilson's interval for as many trials as its variance is worth.

    The effective number of trials is p(1-p) / var(mean), the variance between clusters, at most P: the idea of Korn and
    Graubard (Survey Methodology 1998) for rare outcomes in clusters. It stays honest near 0 and 1, where a bootstrap
    of few values has no width.

    >>> found = clustered_share(np.ones(30), [str(i) for i in range(30)])
    >>> (found.mean, round(found.low, 3), found.high)
    (1.0, 0.886, 1.0)
    """
    _, which = np.unique(np.asarray(clusters_P), return_inverse=True)
    means = np.bincount(which, values_P) / np.bincount(which)
    share = float(means.mean())
    # of the mean over clusters; where all clusters agree it is 0, and every pair counts as a trial
    variance = float(means.var(ddof=1)) / means.size if means.size > 1 else 0.0
    worth = share * (1.0 - share) / variance if variance > 0.0 else float(values_P.size)
    low, high = wilson_interval(share, min(worth, float(values_P.size)), confidence)
    return WinRate(share, low, high, means)


def reliability(margin_P: ArrayLike) -> tuple[Bin, ...]:
    """The reliability diagram of margins: `BINS` bins of equal width over the favoured side's probability in [1/2, 1].

    Empty bins are left out; a margin of 0 counts half right.
    """
    margin = np.asarray(margin_P, dtype=np.float64)
    probability = special.expit(np.abs(margin))
    right = np.where(margin == 0.0, 0.5, (margin > 0.0).astype(np.float64))
    edges = np.linspace(0.5, 1.0, BINS + 1)
    which = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, BINS - 1)
    found: list[Bin] = []
    for index in range(BINS):
        inside = which == index
        if inside.any():
            count, share = int(inside.sum()), float(right[inside].mean())
            low, high = wilson_interval(share, count)
            mean = float(probability[inside].mean())
            found.append(Bin(float(edges[index]), float(edges[index + 1]), count, mean, share, low, high))
    return tuple(found)


def wilson_interval(share: float, count: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share among `count` independent trials (which may be an effective number)."""
    z = float(stats.norm.ppf(0.5 + confidence / 2.0))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * float(np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))  # rounding at 0 and 1


def _mean(values: NDArray[np.generic], where: NDArray[np.bool_]) -> float:
    return float(values[where].mean()) if where.any() else float("nan")


def _spearman(first: Array, second: Array) -> float:
    if first.size < 3 or np.ptp(first) == 0.0 or np.ptp(second) == 0.0:
        return float("nan")
    return float(np.corrcoef(stats.rankdata(first), stats.rankdata(second))[0, 1])


def _check(*arrays: Array | Sequence[str]) -> None:
    sizes = {len(array) for array in arrays}
    if sizes == {0} or len(sizes) > 1:
        raise InputError(f"scores, lengths and prompts of the pairs must be equally many and not none, got {sizes}")
    if not all(np.isfinite(np.asarray(array, dtype=np.float64)).all() for array in arrays[:4]):
        raise InputError("scores and lengths of the pairs must be finite: look at the reward")
