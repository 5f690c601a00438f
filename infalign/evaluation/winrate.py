"""Inference-time win rates from M samples a side: unbiased, ties counted half, intervals by bootstrap over prompts.

theory: `W^T(pi1 > pi2 | x) = E_{y ~ T(pi1), z ~ T(pi2)} 1[r(y) > r(z)] + 1/2 1[r(y) = r(z)]` (InfAlign,
arXiv:2412.19792). With each side sorted ascending, `W = sum_ij a_i b_j (1[r_(i) > s_(j)] + 1/2 1[=])` equals the
average over all subsets of n samples, for the order weights a, b of the procedure. So one table of samples gives every
N, best and worst.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign.types import InputError

if TYPE_CHECKING:
    from infalign.theory.procedures import Procedure

Array = NDArray[np.float64]
Rewards = NDArray[np.float64] | Sequence[ArrayLike]

RESAMPLES = 2000


@dataclass(frozen=True)
class Interval:
    """A mean over prompts with its confidence interval, NaN for a single prompt."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class WinRate:
    """A win rate with its interval: `mean` over prompts, `low`, `high` (NaN for a single prompt), `per_prompt` (P,)."""

    mean: float
    low: float
    high: float
    per_prompt: Array

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def interval(self) -> Interval:
        """The three numbers alone."""
        return Interval(self.mean, self.low, self.high)


def win_rate(
    policy_rewards_PM: Rewards,
    base_rewards_PM: Rewards,
    procedure: Procedure,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate:
    """How often the decoded policy beats the decoded base, under the reward that also decodes.

    Args:
        policy_rewards_PM, base_rewards_PM: (P, M) rewards of samples; rows may differ in length, NaN is left out.
        procedure: applied to both sides.
        confidence: of the interval.
        seed: of the bootstrap.

    Raises:
        InputError: another number of prompts, an infinite reward, or a prompt with fewer than `procedure.n` scores.

    >>> from infalign import BestOfN
    >>> win_rate([[1.0, 3.0], [2.0, 2.0]], [[2.0, 0.0], [2.0, 2.0]], BestOfN(2)).mean
    0.75
    """
    policy, base = _rows(policy_rewards_PM, "policy", procedure), _rows(base_rewards_PM, "base", procedure)
    _check_same(len(policy), len(base))
    values: list[float] = []
    for ours, theirs in zip(policy, base, strict=True):
        values.append(prompt_win_rate(ours, theirs, procedure))
    return summarise(np.array(values), confidence, seed)


def prompt_win_rate(ours_M: Array, theirs_M: Array, procedure: Procedure) -> float:
    """One prompt's `win_rate`, from at least `procedure.n` rewards a side.

    >>> from infalign import BestOfN
    >>> prompt_win_rate(np.array([1.0, 3.0]), np.array([2.0, 0.0]), BestOfN(2))
    1.0
    """
    # order weights belong to ranks, so both sides are sorted; tied samples win alike, whichever has which weight
    weights = _order_weights(procedure, ours_M.size), _order_weights(procedure, theirs_M.size)
    return _cross(np.sort(ours_M), weights[0], np.sort(theirs_M), weights[1])


def judged_win_rate(
    policy: tuple[Rewards, Rewards],
    base: tuple[Rewards, Rewards],
    procedure: Procedure,
    confidence: float = 0.95,
    seed: int = 0,
) -> WinRate:
    """The win rate where a proxy reward decodes and a gold reward judges.

    A sample's weight is its order weight by the proxy, averaged over the proxy's ties (the decoder breaks them
    uniformly). With gold = proxy it equals `win_rate`.

    Args:
        policy, base: (proxy, gold) rewards, (P, M) each; a sample with either score missing is left out.
        procedure, confidence, seed: as in `win_rate`.
    """
    (ours, ours_gold), (theirs, theirs_gold) = _scored_pairs(*policy), _scored_pairs(*base)
    _check_same(len(ours), len(theirs))
    for name, side in (("policy", ours), ("base", theirs)):
        _check_counts(side, name, procedure)
    values = [
        _cross(gold, tied_weights(proxy, procedure), base_gold, tied_weights(base_proxy, procedure))
        for proxy, gold, base_proxy, base_gold in zip(ours, ours_gold, theirs, theirs_gold, strict=True)
    ]
    return summarise(np.array(values), confidence, seed)


def tied_weights(rewards_M: Array, procedure: Procedure) -> Array:
    """(M,) chance that the procedure picks each sample, tied samples sharing theirs equally."""
    order = np.argsort(rewards_M, kind="stable")
    weights, ascending = np.empty(rewards_M.size), rewards_M[order]
    weights[order] = _order_weights(procedure, rewards_M.size)
    if not np.any(ascending[1:] == ascending[:-1]):
        return weights
    _, block = np.unique(rewards_M, return_inverse=True)
    # the mean weight of each block of equal rewards, handed back to its members
    return (np.bincount(block, weights) / np.bincount(block))[block]


@lru_cache(maxsize=1024)
def _order_weights(procedure: Procedure, m: int) -> Array:
    """The procedure's weights of m samples, once for all prompts with so many."""
    weights_m = procedure.order_weights(m)
    weights_m.setflags(write=False)
    return weights_m


def summarise(per_prompt_P: Array, confidence: float = 0.95, seed: int = 0) -> WinRate:
    """Mean and interval of per-prompt win rates."""
    low, high = bootstrap_interval(per_prompt_P, confidence, seed)
    return WinRate(float(np.mean(per_prompt_P)), float(max(low, 0.0)), float(min(high, 1.0)), per_prompt_P)


def difference(first: WinRate, second: WinRate, confidence: float = 0.95, seed: int = 0) -> tuple[float, float, float]:
    """`first - second` on the same prompts, with its paired interval: (mean, low, high)."""
    _check_same(first.per_prompt.size, second.per_prompt.size)
    gap = first.per_prompt - second.per_prompt
    low, high = bootstrap_interval(gap, confidence, seed)
    return float(gap.mean()), low, high


def bootstrap_interval(values_P: Array, confidence: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """A bootstrap-t interval for the mean of P independent values (prompts are the clusters).

    The studentised bootstrap (Efron & Tibshirani 1993, section 12.5) keeps its coverage where the percentile interval
    is too narrow: skewed values, a few dozen prompts. NaN for a single value; of no width for constant values.
    """
    count = values_P.size
    if count == 0:
        raise InputError("there are no prompts to average over")
    if not 0.0 < confidence < 1.0:
        raise InputError(f"confidence must be between 0 and 1, got {confidence}")
    if count == 1:
        return float("nan"), float("nan")
    mean, error = float(values_P.mean()), float(values_P.std(ddof=1) / np.sqrt(count))
    if error == 0.0:
        return mean, mean
    means, variances = _resampled_moments(values_P, np.random.default_rng(seed))
    # a resample of one value drawn P times has no standard error to divide by
    usable = variances > 1e-12 * error**2
    pivots = (means[usable] - mean) / np.sqrt(variances[usable])
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(pivots, [tail, 1.0 - tail])
    # t = (mean* - mean) / error*, turned round: its upper tail gives the lower end
    return mean - float(high) * error, mean - float(low) * error


def _resampled_moments(values_P: Array, rng: np.random.Generator) -> tuple[Array, Array]:
    """Means and squared standard errors of `RESAMPLES` bootstrap samples, in blocks of bounded memory."""
    block = max(1, 2_000_000 // values_P.size)  # rows at a time: 16 MB of drawn indices
    moments: list[tuple[Array, Array]] = []
    for start in range(0, RESAMPLES, block):
        rows = min(block, RESAMPLES - start)
        drawn = values_P[rng.integers(values_P.size, size=(rows, values_P.size))]
        # var / (P - 1) with var over P is the unbiased variance over P: the squared standard error
        moments.append((drawn.mean(1), drawn.var(1) / (values_P.size - 1)))
    return np.concatenate([mean for mean, _ in moments]), np.concatenate([variance for _, variance in moments])


def _cross(policy_M: Array, weights_M: Array, base_M: Array, base_weights_M: Array) -> float:
    """`sum_ij a_i b_j (1[r_i > s_j] + 1/2 1[r_i = s_j])` in O(M log M)."""
    order = np.argsort(base_M, kind="stable")
    # cumulative[k] is the weight of the k lowest base samples: (M + 1,)
    base_sorted, cumulative = base_M[order], np.concatenate([[0.0], np.cumsum(base_weights_M[order])])
    below = cumulative[np.searchsorted(base_sorted, policy_M, side="left")]
    up_to = cumulative[np.searchsorted(base_sorted, policy_M, side="right")]
    # strictly below counts in both terms, a tie in `up_to` alone, hence one half
    return float(weights_M @ (below + up_to) / 2.0)


def _rows(rewards_PM: Rewards, name: str, procedure: Procedure) -> list[Array]:
    if not hasattr(procedure, "order_weights"):
        raise InputError(f"procedure must be a Procedure such as BestOfN(4), got {procedure!r}")
    rows = [np.asarray(row, dtype=np.float64) for row in rewards_PM]
    rows = [row[~np.isnan(row)] for row in rows]
    _check_counts(rows, name, procedure)
    return rows


def _scored_pairs(proxy_PM: Rewards, gold_PM: Rewards) -> tuple[list[Array], list[Array]]:
    _check_same(len(proxy_PM), len(gold_PM))
    pairs = [np.asarray([proxy, gold], dtype=np.float64) for proxy, gold in zip(proxy_PM, gold_PM, strict=True)]
    pairs = [pair[:, ~np.isnan(pair).any(0)] for pair in pairs]
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs]


def _check_counts(rows: Sequence[Array], name: str, procedure: Procedure) -> None:
    for prompt, row in enumerate(rows):
        if np.isinf(row).any():
            raise InputError(f"{name} prompt {prompt} has an infinite reward: rewards must be finite, or NaN")
        if row.size < procedure.n:
            raise InputError(
                f"{procedure!r} needs {procedure.n} scored samples a prompt; {name} prompt {prompt} has {row.size}: "
                "draw more samples (eval_samples) or use a smaller n"
            )


def _check_same(first: int, second: int) -> None:
    if first != second:
        raise InputError(f"policy and base must have the same prompts, got {first} and {second}")
