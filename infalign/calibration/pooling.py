"""Pooled calibration: the policy's own rollouts as further samples of the base, weighted by how likely it draws them.

A rollout y of the policy is a base sample with weight `pi_ref(y) / pi(y)`, and training computes both log-probabilities
anyway. So a sample is ranked among the K base samples (weight 1) together with its prompt's rollouts, of this visit and
of earlier ones: no sample and no reward call more, and the ranks are finest where the policy is
(infalign/theory/README.md). Over long completions the weights become few and heavy: they are clipped, and the effective
number of samples is reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.types import InputError

Array = NDArray[np.float64]

LARGEST = 3.0
"""The most that one rollout counts, in base samples."""
NEWEST = 512
"""Rollouts of earlier visits that are kept for each prompt."""

_NOTHING = np.empty(0)


def rollout_weights(log_ratios: ArrayLike, largest: float = LARGEST) -> Array:
    """What rollouts count as base samples: `pi_ref / pi`, at most `largest`.

    >>> rollout_weights([0.0, -9.0]).round(9).tolist()
    [1.0, 3.0]
    """
    return np.exp(np.minimum(-np.asarray(log_ratios, dtype=np.float64), np.log(largest)))


class Visits:
    """Rewards and weights of the rollouts of each prompt's earlier visits; a weight stays what it was when drawn.

    Args:
        newest: rollouts that are kept for each prompt.

    >>> visits = Visits()
    >>> visits.add("a", [2.0, float("nan")], [0.0, 0.0])
    >>> [column.tolist() for column in visits.of("a")]
    [[2.0], [1.0]]
    """

    def __init__(self, newest: int = NEWEST) -> None:
        self.newest = newest
        self._found: dict[str, tuple[Array, Array]] = {}

    def of(self, key: str) -> tuple[Array, Array]:
        """Rewards and weights of a prompt's earlier rollouts, both (V,)."""
        return self._found.get(key, (_NOTHING, _NOTHING))

    def add(self, key: str, rewards_G: ArrayLike, log_ratios_G: ArrayLike) -> None:
        """Keep a visit's rollouts; those without a score (NaN) are left out."""
        rewards = np.asarray(rewards_G, dtype=np.float64)
        scored = ~np.isnan(rewards)
        before, weights_before = self.of(key)
        weights = rollout_weights(np.asarray(log_ratios_G, dtype=np.float64)[scored])
        self._found[key] = (
            np.concatenate([before, rewards[scored]])[-self.newest :],
            np.concatenate([weights_before, weights])[-self.newest :],
        )

    def state(self) -> dict[str, Any]:
        """`keys`, and arrays: `counts` of rollouts, and the `rewards` and `weights` of all, one after the other."""
        kept = list(self._found.values())
        return {
            "keys": list(self._found),
            "counts": np.array([rewards.size for rewards, _ in kept], dtype=np.int64),
            "rewards": np.concatenate([rewards for rewards, _ in kept] or [_NOTHING]),
            "weights": np.concatenate([weights for _, weights in kept] or [_NOTHING]),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        ends = np.cumsum(state["counts"])
        rewards, weights = (np.asarray(state[name], dtype=np.float64) for name in ("rewards", "weights"))
        self._found = {
            key: (rewards[end - count : end], weights[end - count : end])
            for key, count, end in zip(state["keys"], state["counts"], ends, strict=True)
        }


def pooled_ranks(
    rewards_G: ArrayLike,
    ref_rewards_K: ArrayLike,
    log_ratios_G: ArrayLike,
    largest: float = LARGEST,
    earlier: tuple[Array, Array] = (_NOTHING, _NOTHING),
) -> tuple[Array, Array, float]:
    """The base's mass below each sample of a prompt, and up to it.

    Args:
        rewards_G: rewards of the prompt's rollouts; NaN for no score, which ranks nobody.
        ref_rewards_K: rewards of K base samples; NaN is left out.
        log_ratios_G: log pi(y) - log pi_ref(y) of each rollout, summed over its tokens.
        largest: weight that is the most for one rollout.
        earlier: rewards and weights of further samples (`Visits.of`).

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
    weights = np.concatenate([np.ones(refs.size), rollout_weights(ratios, largest), earlier[1]])
    values = np.concatenate([refs, rewards[scored], earlier[0]])
    below = (values < rewards[:, None]) @ weights / weights.sum()
    up_to = np.minimum((values <= rewards[:, None]) @ weights / weights.sum(), 1.0)  # sums round differently
    count = float(weights.sum() ** 2 / (weights**2).sum())
    return np.where(scored, below, np.nan), np.where(scored, up_to, np.nan), count
