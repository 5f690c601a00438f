"""What was forgotten, what else went with it, and what would have told so before.

Arrays are over I questions or T tasks. Accuracies lie in [0, 1], chance is 1/2.
"""

from __future__ import annotations

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
UNLEARNED, UNCLEAR = "never learned", "unclear"
RESAMPLES = 2000
SLACK = 0.05
"""A smaller loss of accuracy counts as none."""


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

    The interval resamples questions. Where the fine-tuned model is not above chance (the interval of its accuracy
    reaches down to 1/2) there was nothing to forget, and the ratio is NaN with that reason.

    Args:
        tuned_I, forgotten_I: right answers of the fine-tuned and of the forgotten model.
        confidence: of the intervals.
        seed: of the resampling.
    """
    before = accuracy(tuned_I, confidence)
    if before.low <= 0.5:
        return Ratio(
            math.nan,
            reason=f"fine-tuned accuracy {before.mean:.3f} [{before.low:.3f}, {before.high:.3f}] is not above chance",
        )
    value = (before.mean - float(forgotten_I.mean())) / (before.mean - 0.5)
    rows = np.random.default_rng(seed).integers(len(tuned_I), size=(RESAMPLES, len(tuned_I)))
    tuned_R, forgotten_R = tuned_I[rows].mean(axis=1), forgotten_I[rows].mean(axis=1)
    usable = tuned_R > 0.5
    ratios = (tuned_R[usable] - forgotten_R[usable]) / (tuned_R[usable] - 0.5)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(ratios, [tail, 1.0 - tail])
    return Ratio(value, float(low), float(high))


def behaviour(base_I: Array, tuned_I: Array, forgotten_I: Array, confidence: float = 0.95) -> str:
    """Which of the seed's three behaviours a task shows (arXiv:2409.02228, section 4), or why none can be named.

    "retained": about as accurate as fine-tuned (less than `SLACK` lost); "partly forgotten": less, but still above the
    model before fine-tuning and above chance; "forgotten": neither. "never learned": the fine-tuned model is not above
    chance. "unclear": more is lost than `SLACK`, and the interval of the loss over the same questions includes 0.
    """
    if accuracy(tuned_I, confidence).low <= 0.5:
        return UNLEARNED
    lost_I = tuned_I - forgotten_I
    if lost_I.mean() < SLACK:
        return RETAINED
    if bootstrap_interval(lost_I, confidence)[0] <= 0.0:
        return UNCLEAR
    above_base = bootstrap_interval(forgotten_I - base_I, confidence)[0] > 0.0
    return PARTLY if above_base and accuracy(forgotten_I, confidence).low > 0.5 else FORGOTTEN


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

    The interval is Fisher's, with the variance (1 + r^2 / 2) / (T - 3) for ranks (Bonett & Wright 2000); NaN for fewer
    than four tasks or a constant.
    """
    usable = np.isfinite(predictor_T) & np.isfinite(outcome_T)
    x, y = predictor_T[usable], outcome_T[usable]
    count = int(usable.sum())
    if count < 4 or np.ptp(x) == 0.0 or np.ptp(y) == 0.0:
        return Correlation(math.nan, math.nan, math.nan, count)
    value = float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])
    inside = min(max(value, -1 + 1e-9), 1 - 1e-9)
    half = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt((1 + inside**2 / 2) / (count - 3))
    return Correlation(value, math.tanh(math.atanh(inside) - half), math.tanh(math.atanh(inside) + half), count)


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


def difficulty(base_I: Array) -> float:
    """How hard a task is for the model before fine-tuning: 1 - accuracy."""
    return 1.0 - float(base_I.mean())


def confidence_of(p_I: Array) -> float:
    """Mean probability of the answer that a model prefers, between 1/2 and 1."""
    return float(np.maximum(p_I, 1.0 - p_I).mean())
