"""The calibrated reward: the quantile of a reward among K rewards of base-policy samples on the same prompt.

`C(x, y) = P_{z ~ pi_ref}(r(x,z) < r(x,y)) + 1/2 P(r(x,z) = r(x,y))` (InfAlign, arXiv:2412.19792). It does
not change under any increasing map of the reward, its mean over the reference is exactly 1/2, and its mean over a
policy is that policy's standard win rate against the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.types import InputError

Method = Literal["midrank", "interpolated"]
Rewards = NDArray[np.float64] | Sequence[ArrayLike]


def calibrate(rewards_PG: Rewards, ref_rewards_PK: Rewards, method: Method = "midrank") -> NDArray[np.float64]:
    """Calibrated rewards in [0, 1].

    Args:
        rewards_PG: (P, G) rewards, any scale. NaN means "no score" and stays NaN.
        ref_rewards_PK: (P, K) rewards of base samples on the same prompts; rows may differ in length; NaN is left out.
        method: "midrank" is C above, ties exact. "interpolated" is piecewise linear through the mid-ranks with
            exponential tails: less noisy for K below about 32, but it depends on the reward's scale.

    Returns:
        (P, G) float64.

    Raises:
        InputError: another number of prompts, a prompt without any reference reward, an infinite reward, or an
            unknown method.

    >>> calibrate([[1.0, 2.0, 9.0]], [[1.0, 2.0, 2.0, 3.0]]).tolist()
    [[0.125, 0.5, 1.0]]
    """
    if method not in _METHODS:
        raise InputError(f"method {method!r} is unknown: use one of {', '.join(_METHODS)}")
    if len(rewards_PG) != len(ref_rewards_PK):
        raise InputError(f"rewards are for {len(rewards_PG)} prompts, reference rewards for {len(ref_rewards_PK)}")
    references = [_reference(row, prompt) for prompt, row in enumerate(ref_rewards_PK)]
    rows = [np.asarray(row, dtype=np.float64) for row in rewards_PG]
    if any(np.isinf(row).any() for row in rows):
        raise InputError("a reward is infinite: rewards must be finite numbers, or NaN for no score")
    rank = _METHODS[method]
    return np.array([rank(row, reference) for row, reference in zip(rows, references, strict=True)])


def clip_to_open(calibrated: NDArray[np.float64], count: NDArray[np.int64] | int) -> NDArray[np.float64]:
    """Calibrated rewards moved into [1/(2(K+1)), 1 - 1/(2(K+1))], where every transform is finite.

    Args:
        calibrated: any shape, in [0, 1].
        count: K, the number of reference rewards behind each (broadcasts).
    """
    margin = 0.5 / (np.asarray(count, dtype=np.float64) + 1.0)
    return np.clip(calibrated, margin, 1.0 - margin)


def _reference(row: ArrayLike, prompt: int) -> NDArray[np.float64]:
    """A prompt's reference rewards, sorted, without NaN."""
    values = np.asarray(row, dtype=np.float64)
    values = np.sort(values[~np.isnan(values)])
    if values.size == 0:
        raise InputError(f"prompt {prompt} has no reference reward: calibrate it first, or drop it")
    if np.isinf(values).any():
        raise InputError(f"prompt {prompt} has an infinite reference reward: rewards must be finite, or NaN")
    return values


def _midrank(rewards_G: NDArray[np.float64], reference_K: NDArray[np.float64]) -> NDArray[np.float64]:
    # references below, and below or equal: their mean counts a tie as one half
    below = np.searchsorted(reference_K, rewards_G, side="left")
    up_to = np.searchsorted(reference_K, rewards_G, side="right")
    return np.where(np.isnan(rewards_G), np.nan, (below + up_to) / (2.0 * reference_K.size))


def _interpolated(rewards_G: NDArray[np.float64], reference_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Linear between the mid-ranks of distinct reference rewards; outside, the tail mass decays exponentially."""
    levels = np.unique(reference_K)
    heights = _midrank(levels, reference_K)
    inside = np.interp(rewards_G, levels, heights)
    # the mass beyond the outermost reference is half of its tie block's; the lower tail is the upper one mirrored
    below = heights[0] * _decay(levels[0] - rewards_G, _tail_scale(-reference_K[::-1]))
    above = 1.0 - (1.0 - heights[-1]) * _decay(rewards_G - levels[-1], _tail_scale(reference_K))
    found = np.where(rewards_G < levels[0], below, np.where(rewards_G > levels[-1], above, inside))
    return np.where(np.isnan(rewards_G), np.nan, found)


def _tail_scale(ascending_K: NDArray[np.float64]) -> float:
    """Mean excess of the top sqrt(K) values over the next one: the maximum-likelihood scale of an exponential tail."""
    top = max(1, int(np.sqrt(ascending_K.size)))  # few enough to be the tail, and growing with K
    if ascending_K.size <= top:
        return 0.0
    return float((ascending_K[-top:] - ascending_K[-top - 1]).mean())


def _decay(distance: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    if scale <= 0.0:  # all of the tail at one value: no mass beyond it
        return np.where(distance > 0, 0.0, 1.0)
    return np.exp(-np.clip(distance, 0.0, None) / scale)


_METHODS = {"midrank": _midrank, "interpolated": _interpolated}
