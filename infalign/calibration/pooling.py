"""Pooled calibration: the policy's own rollouts as further samples of the base, weighted by how likely it draws them.

A rollout y of the policy is a base sample with weight `pi_ref(y) / pi(y)`, and training computes both log-probabilities
anyway. So a sample is ranked among the K base samples (weight 1) together with its prompt's rollouts: no sample and no
reward call more, and the ranks are finest where the policy is (infalign/theory/README.md). Over long completions the
weights become few and heavy: they are clipped, and the effective number of samples is reported.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.types import InputError

Array = NDArray[np.float64]

LARGEST = 3.0
"""The most that one rollout counts, in base samples."""


def pooled_ranks(
    rewards_G: ArrayLike, ref_rewards_K: ArrayLike, log_ratios_G: ArrayLike, largest: float = LARGEST
) -> tuple[Array, Array, float]:
    """The base's mass below each sample of a prompt, and up to it.

    Args:
        rewards_G: rewards of the prompt's rollouts; NaN for no score, which ranks nobody.
        ref_rewards_K: rewards of K base samples; NaN is left out.
        log_ratios_G: log pi(y) - log pi_ref(y) of each rollout, summed over its tokens.
        largest: weight that is the most for one rollout.

    Returns:
        `below` and `up_to`, (G,) each in [0, 1]; their mean is the calibrated reward, in which ties, and the sample
        itself, count one half. And the effective number of samples, `(sum w)^2 / sum w^2`.

    Raises:
        InputError: no base sample has a score.

    >>> below, up_to, count = pooled_ranks([2.0, 4.0], [1.0, 3.0], [0.0, 0.0])
    >>> below.tolist(), up_to.tolist(), count
    ([0.25, 0.75], [0.5, 1.0], 4.0)
    """
    rewards, refs = np.asarray(rewards_G, dtype=np.float64), np.asarray(ref_rewards_K, dtype=np.float64)
    refs = refs[~np.isnan(refs)]
    if refs.size == 0:
        raise InputError("a prompt has no reference reward: calibrate it first, or drop it")
    scored = ~np.isnan(rewards)
    ratios = np.asarray(log_ratios_G, dtype=np.float64)[scored]
    weights = np.concatenate([np.ones(refs.size), np.exp(np.minimum(-ratios, np.log(largest)))])
    values = np.concatenate([refs, rewards[scored]])
    below = (values < rewards[:, None]) @ weights / weights.sum()
    up_to = np.minimum((values <= rewards[:, None]) @ weights / weights.sum(), 1.0)  # sums round differently
    count = float(weights.sum() ** 2 / (weights**2).sum())
    return np.where(scored, below, np.nan), np.where(scored, up_to, np.nan), count
