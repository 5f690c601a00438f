"""What was forgotten, what else went with it, and what would have told so before.

Arrays are over I questions or T tasks. Accuracies lie in [0, 1], chance is 1/2.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.cluster import hierarchy

from infalign.evaluation.forgotten import Accuracy, Correlation, Ratio
from infalign.evaluation.pairs import wilson_interval
from infalign.evaluation.winrate import bootstrap_interval

Array = NDArray[np.float64]

RETAINED, PARTLY, FORGOTTEN = "retained", "partly forgotten", "forgotten"
UNLEARNED, INVERTED, UNCLEAR = "never learned", "inverted", "unclear"
DRAWS = 4000
SOME = 0.3
"""Part of a skill that may be gone from what is retained, or left of what is forgotten."""
SLACK = 0.05
"""Accuracy above the model before fine-tuning that counts as none."""


def accuracy(correct_I: Array, confidence: float = 0.95) -> Accuracy:
    """The accuracy of I answers, each 0 or 1 (or a probability to be right).

    >>> accuracy(np.array([1.0, 1.0, 0.0, 1.0])).mean
    0.75
    """
    mean = float(correct_I.mean())
    return Accuracy(mean, *wilson_interval(mean, len(correct_I), confidence), len(correct_I))


def forget_gap(forgotten: float) -> float:
    """How far an accuracy is above chance: acc_forget - 1/2."""
    return forgotten - 0.5


def forget_ratio(tuned_I: Array, forgotten_I: Array, confidence: float = 0.95, seed: int = 0) -> Ratio:
    """(acc_tuned - acc_forgotten) / (acc_tuned - 1/2): the part of a skill that is gone, over the same questions.

    The interval is the Bayesian one of the two-by-two table of right answers under Jeffreys' prior (half a question in
    each field), which has a width also where all answers are right. Where the fine-tuned model is not above chance
    (the interval of its accuracy reaches down to 1/2) nothing could be forgotten: NaN with that reason.

    Args:
        tuned_I, forgotten_I: right answers, 0 or 1, of the fine-tuned and of the forgotten model.
        confidence: of the intervals.
        seed: of the draws.
    """
    before = accuracy(tuned_I, confidence)
    if before.low <= 0.5:
        return Ratio(
            math.nan,
            reason=f"fine-tuned accuracy {before.mean:.3f} [{before.low:.3f}, {before.high:.3f}] is not above chance",
        )
    value = (before.mean - float(forgotten_I.mean())) / (before.mean - 0.5)
    fields = [(tuned_I == t) & (forgotten_I == f) for t, f in ((1, 1), (1, 0), (0, 1), (0, 0))]
    counts = np.array([float(one.sum()) for one in fields])
    both_R, lost_R, gained_R, _ = np.random.default_rng(seed).dirichlet(counts + 0.5, size=DRAWS).T
    tuned_R, forgotten_R = both_R + lost_R, both_R + gained_R
    usable = tuned_R > 0.5
    ratios = (tuned_R[usable] - forgotten_R[usable]) / (tuned_R[usable] - 0.5)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return Ratio(value, float(min(low, value)), float(max(high, value)))


def behaviour(base_I: Array, tuned_I: Array, forgotten_I: Array, confidence: float = 0.95) -> str:
    """Which of the seed's three behaviours a task shows (arXiv:2409.02228, section 4), as far as intervals show it.

    - "retained": surely less than `SOME` of the skill is gone (the forget ratio's upper end);
    - "forgotten": surely more than 1 - `SOME` is gone, or the accuracy surely exceeds the model's before fine-tuning by
      no more than `SLACK`;
    - "partly forgotten": surely some of it is gone, and the accuracy is surely above that model's and above chance;
    - "inverted": surely below chance, as flipped labels make it: the skill is there, with its sign turned;
    - "never learned": the fine-tuned model is not surely above chance;
    - "unclear": none of these, or too few questions to tell.
    """
    ratio = forget_ratio(tuned_I, forgotten_I, confidence)
    after = accuracy(forgotten_I, confidence)
    if ratio.reason:
        return UNLEARNED
    if after.high < 0.5:
        return INVERTED
    if ratio.high <= SOME:
        return RETAINED
    if ratio.low <= 0.0:
        return UNCLEAR
    above_low, above_high = bootstrap_interval(forgotten_I - base_I, confidence)
    if ratio.low >= 1.0 - SOME or above_high <= SLACK:
        return FORGOTTEN
    return PARTLY if above_low > 0.0 and after.low > 0.5 else UNCLEAR


# ---- the cross-task matrix ----


def cluster_order(matrix_TU: Array) -> list[int]:
    """An order of the T rows in which rows that are alike stand together (average linkage of Euclidean distances).

    >>> cluster_order(np.array([[0.0, 1.0], [1.0, 0.0], [0.1, 0.9]]))[1] in (0, 2)
    True
    """
    if len(matrix_TU) < 3:
        return list(range(len(matrix_TU)))
    filled = np.where(np.isfinite(matrix_TU), matrix_TU, 0.5)
    return [int(at) for at in hierarchy.leaves_list(hierarchy.linkage(filled, "average", optimal_ordering=True))]


# ---- predictors ----


def correlation(predictor_T: Array, outcome_T: Array, confidence: float = 0.95) -> Correlation:
    """Spearman's correlation of a predictor with an outcome over T tasks; tasks where one is NaN are left out.

    The interval is Fisher's, with the variance (1 + r^2 / 2) / (T - 3) for ranks (Bonett & Wright 2000); it is NaN for
    a perfect order, of which it knows nothing. `p` is the two-sided share of orders of the tasks that correlate at
    least as much. NaN for fewer than four tasks or a constant.
    """
    usable = np.isfinite(predictor_T) & np.isfinite(outcome_T)
    x, y = predictor_T[usable], outcome_T[usable]
    count = int(usable.sum())
    if count < 4 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return Correlation(math.nan, math.nan, math.nan, count, math.nan)
    ranks = stats.rankdata(x), stats.rankdata(y)
    value = float(np.corrcoef(*ranks)[0, 1])
    low = high = math.nan
    if abs(value) < 1 - 1e-9:
        half = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt((1 + value**2 / 2) / (count - 3))
        low, high = (math.tanh(math.atanh(value) + sign * half) for sign in (-1, 1))
    return Correlation(value, low, high, count, _share_of_orders(*ranks))


def _share_of_orders(x: Array, y: Array) -> float:
    """All orders of up to eight tasks, or 20,000 of more."""
    if len(x) <= 8:
        orders = np.array(list(itertools.permutations(range(len(x)))))
    else:
        orders = np.random.default_rng(0).permuted(np.tile(np.arange(len(x)), (20_000, 1)), axis=1)
    products = (x - x.mean())[orders] @ (y - y.mean())
    return float((np.abs(products) >= abs(float((x - x.mean()) @ (y - y.mean()))) - 1e-9).mean())


# ---- more than one answer ----


def pass_at(p_I: Array, n: int) -> float:
    """Mean probability that one of n answers is right at least: 1 - (1 - p)^n.

    >>> pass_at(np.array([0.5, 0.5]), 2)
    0.75
    """
    return float((1.0 - (1.0 - p_I) ** n).mean())


def best_of(p_I: Array, verifier_I: Array, n: int) -> float:
    """Accuracy of Best-of-n where answers are drawn with probability p to be right and a verifier picks one.

    Of two kinds of answers the verifier picks the one that it prefers as soon as it is among the n.

    Args:
        p_I: probability that one answer is right.
        verifier_I: 1 where the verifier prefers the right answer, 0 where the wrong one.
        n: answers a question.

    >>> best_of(np.array([0.5, 0.5]), np.array([1.0, 0.0]), 2)
    0.5
    """
    return float(np.where(verifier_I > 0.5, 1.0 - (1.0 - p_I) ** n, p_I**n).mean())


def confidence_of(p_I: Array) -> float:
    """Mean probability of the answer that a model prefers, between 1/2 and 1."""
    return float(np.maximum(p_I, 1.0 - p_I).mean())
