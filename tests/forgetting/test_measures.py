"""Measures by their definitions, and where they have no meaning."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from infalign.forgetting.measures import (
    accuracy,
    behaviour,
    best_of,
    cluster_order,
    confidence_of,
    correlation,
    forget_gap,
    forget_ratio,
    pass_at,
)


def answers(right, count=200):
    return np.array([1.0] * right + [0.0] * (count - right))


def test_accuracy_and_gap():
    found = accuracy(answers(150))
    assert found.mean == 0.75 and found.count == 200
    interval = stats.binomtest(150, 200).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1e-9)
    assert forget_gap(found.mean) == 0.25


def test_the_forget_ratio_is_the_part_that_is_gone():
    assert forget_ratio(answers(180), answers(100)).value == pytest.approx(1.0)  # back at chance
    assert forget_ratio(answers(180), answers(180)).value == 0.0
    assert forget_ratio(answers(180), answers(140)).value == pytest.approx((0.9 - 0.7) / 0.4)
    assert forget_ratio(answers(180), answers(60)).value == pytest.approx((0.9 - 0.3) / 0.4)  # flipped: more than all


def test_the_ratios_interval_covers():
    """Of 200 made-up experiments with answers right at .85 and .6, nearly 95 % of the intervals hold the truth."""
    rng = np.random.default_rng(0)
    truth, inside = (0.85 - 0.6) / 0.35, 0
    for trial in range(200):
        found = forget_ratio((rng.random(150) < 0.85) * 1.0, (rng.random(150) < 0.6) * 1.0, seed=trial)
        inside += found.low <= truth <= found.high
    assert 178 <= inside <= 200  # 190 expected, standard deviation 3.1


def test_no_ratio_where_nothing_was_learned():
    for right in (100, 108, 60):
        found = forget_ratio(answers(right), answers(100))
        assert math.isnan(found.value) and math.isnan(found.low)
        assert found.reason.startswith(f"fine-tuned accuracy {right / 200:.3f}") and "not above chance" in found.reason


def test_the_ratios_interval_has_a_width_where_all_is_right():
    found = forget_ratio(answers(30, 30), answers(30, 30))
    assert found.value == 0.0 and found.low < -0.005 and 0.01 < found.high < 0.3


@pytest.mark.parametrize(
    ("base", "tuned", "forgotten", "named"),
    [
        (100, 190, 188, "retained"),
        (100, 180, 190, "retained"),
        (110, 190, 155, "partly forgotten"),
        (110, 190, 102, "forgotten"),
        (180, 190, 140, "forgotten"),  # above chance, and surely no better than before fine-tuning
        (100, 190, 20, "inverted"),
        (100, 104, 100, "never learned"),
    ],
)
def test_behaviours(base, tuned, forgotten, named):
    rng = np.random.default_rng(1)
    rows = [rng.permutation(answers(right)) for right in (base, tuned, forgotten)]
    assert behaviour(*rows) == named


def test_few_questions_leave_it_unclear():
    rows = [np.random.default_rng(1).permutation(answers(right, 20)) for right in (10, 19, 17)]
    assert behaviour(*rows) == "unclear"


def test_a_behaviour_is_named_only_where_questions_show_it():
    """Of skills that are kept to 43 % or wholly, few are called forgotten, however few the questions."""
    rng = np.random.default_rng(3)
    for count in (20, 30, 80):
        for base, tuned, forgotten in ((0.5, 0.97, 0.7), (0.88, 0.97, 0.95)):
            found = [
                behaviour(*[(rng.random(count) < one) * 1.0 for one in (base, tuned, forgotten)]) for _ in range(200)
            ]
            assert found.count("forgotten") <= 12, (count, base)  # 2.5 % in each of two ways: 10 of 200


def test_rows_that_are_alike_stand_together():
    matrix = np.array([[0.9, 0.5, 0.9, 0.5], [0.5, 0.9, 0.5, 0.9], [0.88, 0.52, 0.9, 0.5], [0.5, 0.9, 0.55, 0.9]])
    order = cluster_order(matrix)
    assert sorted(order) == [0, 1, 2, 3]
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    assert cluster_order(matrix[:2]) == [0, 1]
    assert sorted(cluster_order(np.full((4, 4), np.nan))) == [0, 1, 2, 3]


def test_the_correlation_is_of_ranks_and_has_an_interval():
    x = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    y = np.array([2.0, 1.0, 4.0, 3.0, 6.0, 5.0, 9.0, 7.0])
    found = correlation(x, y)
    assert found.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12) and found.count == 8
    half = 1.959963985 * math.sqrt((1 + found.value**2 / 2) / 5)
    ranked = stats.rankdata(y)
    orders = [abs(np.corrcoef(x, ranked[list(order)])[0, 1]) for order in itertools.permutations(range(8))]
    assert found.p == pytest.approx(np.mean(np.array(orders) >= abs(found.value) - 1e-9), abs=1e-12)
    assert math.atanh(found.high) == pytest.approx(math.atanh(found.value) + half, abs=1e-6)
    assert correlation(np.exp(x), y) == found  # increasing maps change no rank


def test_tasks_without_a_value_are_left_out_of_the_correlation():
    x, y = np.arange(6.0), np.array([0.0, 1.0, math.nan, 3.0, 2.0, 5.0])
    assert correlation(x, y).count == 5
    perfect = correlation(x[:4], x[:4])
    assert perfect.value == pytest.approx(1.0) and math.isnan(perfect.low) and perfect.p == pytest.approx(2 / 24)
    for few in (correlation(x[:3], y[:3]), correlation(x, np.ones(6))):
        assert math.isnan(few.value) and math.isnan(few.low)


def test_more_answers_by_counting():
    """pass@n and Best-of-n against the enumeration of all outcomes of three draws."""
    p, verifier = np.array([0.3, 0.8]), np.array([1.0, 0.0])
    passed = picked = 0.0
    for question in range(2):
        for outcome in itertools.product((0, 1), repeat=3):
            chance = np.prod([p[question] if right else 1 - p[question] for right in outcome])
            passed += chance * any(outcome) / 2
            picked += chance * (any(outcome) if verifier[question] else all(outcome)) / 2
    assert pass_at(p, 3) == pytest.approx(passed, abs=1e-12)
    assert best_of(p, verifier, 3) == pytest.approx(picked, abs=1e-12)
    assert best_of(p, verifier, 1) == pass_at(p, 1) == pytest.approx(p.mean())


def test_confidence():
    assert confidence_of(np.array([0.2, 0.9])) == pytest.approx(0.85)
