"""Length-controlled win rates: how often the policy would win if its answers were as long as the base's.

A logistic regression of "the policy's decoded answer wins" on the difference in length, evaluated at difference 0:
P(win) = sigmoid(theta + phi tanh(d / s)), s the standard deviation of d. This is the length term of length-controlled
AlpacaEval (Dubois et al. 2024, arXiv:2404.04475); its term for how hard an instruction is is left out. Pairs count by
the chance that the decoder produces them (the order weights of both sides): every N comes from one table of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import special

from infalign.evaluation.winrate import tied_weights
from infalign.types import InputError

if TYPE_CHECKING:
    from infalign.theory.procedures import Procedure

Array = NDArray[np.float64]

BINS = 81  # of tanh(d / s) in [-1, 1]; pairs in a bin share their mean
RESAMPLES = 400
LEAST_OVERLAP = 0.05
"""Of the pairs must be on either side of equal length: else what happens there is a guess, and NaN is returned."""
_SEEN = 1e-12  # a sample whose weight is below is never decoded
_STEPS = 30  # of Newton's method
_LONGEST = 4.0  # step that Newton's method may make
_RIDGE = 1e-6  # keeps the fit finite where one side always wins


@dataclass(frozen=True)
class LengthControlled:
    """A win rate at equal length, beside the plain one; NaN where lengths hardly overlap.

    `mean` with its interval `low`, `high` over prompts; `plain`, those pairs without control; `slope`, phi; `longer`,
    by how much the policy's decoded answers are longer on average, in the unit of the lengths.
    """

    mean: float
    low: float
    high: float
    plain: float
    slope: float
    longer: float


@dataclass(frozen=True)
class Side:
    """Per prompt, of one model: the rewards that decode (M,), those that judge (M,), and lengths (M,)."""

    proxy: Sequence[Array]
    judge: Sequence[Array]
    lengths: Sequence[Array]


def length_controlled_win_rate(
    policy: Side, base: Side, procedure: Procedure, confidence: float = 0.95, seed: int = 0
) -> LengthControlled:
    """The win rate at equal length, from all pairs of samples of each prompt.

    Args:
        policy, base: P prompts each; samples with a score missing are left out.
        procedure: decodes both sides.
        confidence: of the interval (percentiles of refits on resampled prompts).
        seed: of the bootstrap.

    Raises:
        InputError: another number of prompts.
    """
    if len(policy.proxy) != len(base.proxy):
        raise InputError(f"policy and base must have the same prompts, got {len(policy.proxy)} and {len(base.proxy)}")
    count = len(policy.proxy)
    decoded = [[_decoded(side, procedure, number) for side in (policy, base)] for number in range(count)]
    mean, spread = _moments(decoded)
    binned_PBF = np.empty((count, BINS, 3))
    shares_P2 = np.empty((count, 2))  # of longer and of shorter answers
    for number, (ours, theirs) in enumerate(decoded):  # a prompt's pairs are many: never all prompts' at once
        weight, longer, win = _pairs(ours, theirs)
        binned_PBF[number] = _binned(weight, longer, win, spread)
        # pairs of equal length are on both sides
        shares_P2[number] = (weight * (longer >= 0.0)).sum(), (weight * (longer <= 0.0)).sum()
    # a difference of 0 has tanh(0) = 0, so theta alone is the log-odds at equal length
    theta, slope = _fit(binned_PBF.sum(0)[None])[0].tolist()
    if shares_P2.mean(0).min() < LEAST_OVERLAP:
        theta = slope = np.nan
    drawn_RP = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
    # resampling prompts only changes how often each counts: (R, P) counts x (P, B, F) sums = (R, B, F), no pair again
    refits = _fit(np.tensordot(drawn_RP.astype(np.float64), binned_PBF, 1))[:, 0]
    tail = (1.0 - confidence) / 2.0
    low, high = special.expit(np.quantile(refits, [tail, 1.0 - tail])).tolist() if count > 1 else (np.nan, np.nan)
    if np.isnan(theta):
        low = high = np.nan
    total = binned_PBF.sum((0, 1))
    return LengthControlled(float(special.expit(theta)), low, high, float(total[1] / total[0]), slope, mean)


def decoded_reward(side: Side, procedure: Procedure) -> float:
    """The mean judged reward of what the decoder picks; with a binary reward and Best-of-N this is pass@N, unbiased."""
    means = []
    for proxy, judge in zip(side.proxy, side.judge, strict=True):
        scored = ~(np.isnan(proxy) | np.isnan(judge))
        means.append(float(tied_weights(proxy[scored], procedure) @ judge[scored]))
    return float(np.mean(means))


Decodable = tuple[Array, Array, Array]
"""Of one side of a prompt, the samples that can be decoded: weights, judged rewards, lengths."""


def _moments(decoded: Sequence[Sequence[Decodable]]) -> tuple[float, float]:
    """Mean and standard deviation of the difference in length over all pairs, from each side's own moments."""
    centre = float(np.mean([(weights * lengths).sum() for sides in decoded for weights, _, lengths in sides]))
    first, second = 0.0, 0.0
    for sides in decoded:
        (a, la, laa), (b, lb, lbb) = (
            (w.sum(), (w * (x - centre)).sum(), (w * (x - centre) ** 2).sum()) for w, _, x in sides
        )
        # sum_ij a_i b_j (x_i - y_j)^k expands into each side's own sums; lengths are centred so that they do not cancel
        first += la * b - a * lb
        second += laa * b - 2.0 * la * lb + a * lbb
    mean = first / len(decoded)
    return float(mean), float(np.sqrt(max(second / len(decoded) - mean**2, 0.0)))


def _pairs(ours: Decodable, theirs: Decodable) -> tuple[Array, Array, Array]:
    """Of one prompt's pairs: weight, difference in length, and win, flat."""
    weight = ours[0][:, None] * theirs[0]
    longer = ours[2][:, None] - theirs[2]
    win = (ours[1][:, None] > theirs[1]) + 0.5 * (ours[1][:, None] == theirs[1])
    return weight.ravel(), longer.ravel(), win.ravel()


def _decoded(side: Side, procedure: Procedure, number: int) -> Decodable:
    proxy, judge, lengths = (np.asarray(rows[number]) for rows in (side.proxy, side.judge, side.lengths))
    scored = ~(np.isnan(proxy) | np.isnan(judge))
    weights = tied_weights(proxy[scored], procedure)
    seen = weights > _SEEN
    return weights[seen], judge[scored][seen], lengths[scored][seen]


def _binned(weight: Array, longer: Array, win: Array, spread: float) -> Array:
    """(BINS, 3): weight, weighted wins and weighted tanh(d / s) of the pairs in each bin."""
    x = np.tanh(longer / spread) if spread > 0.0 else np.zeros_like(longer)
    which = np.minimum(((x + 1.0) / 2.0 * BINS).astype(np.int64), BINS - 1)  # x = 1 is in the last bin
    sums = [np.bincount(which, weights=values, minlength=BINS) for values in (weight, weight * win, weight * x)]
    return np.stack([one.astype(np.float64) for one in sums], axis=1)


def _fit(binned_RBF: Array) -> Array:
    """theta and phi of R weighted logistic regressions, (R, 2), by Newton's method on all of them at once."""
    # weights of each regression sum to 1, so that the ridge means the same for any number of pairs
    weight, wins = (binned_RBF[..., part] / binned_RBF[..., 0].sum(1, keepdims=True) for part in (0, 1))
    x = np.divide(binned_RBF[..., 2], binned_RBF[..., 0], out=np.zeros_like(weight), where=binned_RBF[..., 0] > 0.0)
    theta, phi = np.zeros((2, len(weight)))
    for _ in range(_STEPS):
        chance = special.expit(theta[:, None] + phi[:, None] * x)
        left, spread = wins - weight * chance, weight * chance * (1.0 - chance)
        g0, g1 = left.sum(1) - _RIDGE * theta, (left * x).sum(1) - _RIDGE * phi
        a, b, c = spread.sum(1) + _RIDGE, (spread * x).sum(1), (spread * x * x).sum(1) + _RIDGE
        # the Hessian [[a, b], [b, c]] inverted in closed form
        steps = np.stack([c * g0 - b * g1, a * g1 - b * g0]) / (a * c - b * b)
        steps *= np.minimum(1.0, _LONGEST / np.maximum(np.abs(steps).max(0), 1e-300))
        theta, phi = theta + steps[0], phi + steps[1]
        if np.abs(steps).max() < 1e-9:
            break
    return np.stack([theta, phi], axis=1)
