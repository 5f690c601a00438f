"""A reward model on held-out pairs: by the definitions, and laws that hold whatever the scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from infalign.evaluation.pairs import (
    BINS,
    clustered_mean,
    clustered_share,
    pair_quality,
    reliability,
    wilson_interval,
)
from infalign.types import InputError

RNG = np.random.default_rng(0)
CHOSEN, REJECTED = RNG.normal(0.4, 1, 200).round(1), RNG.normal(0, 1, 200).round(1)
LONG, SHORT = RNG.integers(5, 60, 200), RNG.integers(5, 60, 200)
NAMES = [f"p{i}" for i in range(200)]


def quality(chosen=CHOSEN, rejected=REJECTED, **options):
    return pair_quality(chosen, rejected, LONG, SHORT, NAMES, **options)


def test_everything_by_its_definition():
    found = quality()
    wins = sum(1.0 if c > r else 0.5 if c == r else 0.0 for c, r in zip(CHOSEN, REJECTED, strict=True))
    assert found.accuracy.mean == pytest.approx(wins / 200)
    assert found.log_loss == pytest.approx(
        np.mean([math.log(1 + math.exp(r - c)) for c, r in zip(CHOSEN, REJECTED, strict=True)])
    )
    assert found.tie_rate == np.mean(CHOSEN == REJECTED) > 0
    assert found.length_correlation == pytest.approx(stats.spearmanr(CHOSEN - REJECTED, LONG - SHORT).statistic)
    both = [(c > r) == (a > b) for c, r, a, b in zip(CHOSEN, REJECTED, LONG, SHORT, strict=True) if c != r and a != b]
    assert found.longer_preferred == pytest.approx(np.mean(both))
    assert found.longer_chosen == pytest.approx(np.mean([a > b for a, b in zip(LONG, SHORT, strict=True) if a != b]))
    like = [i for i in range(200) if abs(LONG[i] - SHORT[i]) <= 0.1 * max(LONG[i], SHORT[i])]
    assert found.like_length_pairs == len(like) > 5
    assert found.like_length_accuracy == pytest.approx(
        np.mean([(CHOSEN[i] > REJECTED[i]) + 0.5 * (CHOSEN[i] == REJECTED[i]) for i in like])
    )


def test_the_calibration_error_by_a_double_loop():
    margins = CHOSEN - REJECTED
    error = 0.0
    for index in range(BINS):
        low, high = 0.5 + index * 0.5 / BINS, 0.5 + (index + 1) * 0.5 / BINS
        inside = [m for m in margins if low <= 1 / (1 + math.exp(-abs(m))) < high]
        if inside:
            said = np.mean([1 / (1 + math.exp(-abs(m))) for m in inside])
            right = np.mean([1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in inside])
            error += len(inside) / 200 * abs(said - right)
    assert quality().ece == pytest.approx(error)
    assert sum(one.count for one in reliability(margins)) == 200


def test_a_calibrated_model_has_no_calibration_error_and_a_bold_one_has():
    rng = np.random.default_rng(1)
    margin = np.abs(rng.normal(0, 1.5, 40000))
    margin = np.where(rng.random(margin.size) < special.expit(margin), margin, -margin)
    names = [str(i) for i in range(margin.size)]
    lengths = np.ones(margin.size)
    calibrated = pair_quality(margin, 0 * margin, lengths, lengths, names)
    assert calibrated.ece < 0.01
    bold = pair_quality(5 * margin, 0 * margin, lengths, lengths, names)
    assert bold.ece > 0.1 and bold.accuracy.mean == calibrated.accuracy.mean


def test_swapping_the_sides_mirrors_the_accuracy_and_constants_change_nothing():
    assert quality().accuracy.mean + quality(REJECTED, CHOSEN).accuracy.mean == pytest.approx(1.0)
    shifted = quality(CHOSEN + 3, REJECTED + 3)
    assert shifted.log_loss == pytest.approx(quality().log_loss) and shifted.ece == pytest.approx(quality().ece)


def test_a_constant_reward_is_chance():
    found = quality(np.zeros(200), np.zeros(200))
    assert (found.accuracy.mean, found.tie_rate) == (0.5, 1.0)
    assert found.log_loss == pytest.approx(math.log(2)) and math.isnan(found.length_correlation)
    assert math.isnan(found.longer_preferred)


def test_pairs_of_one_prompt_are_one_cluster():
    """Copies of every pair leave the mean and do not shrink the interval."""
    values, names = np.array([1.0, 0.0, 1.0, 1.0, 0.0, 1.0]), list("abcdef")
    once, thrice = clustered_mean(values, names), clustered_mean(np.tile(values, 3), names * 3)
    assert (once.mean, once.low, once.high) == (thrice.mean, thrice.low, thrice.high)


@pytest.mark.parametrize(("share", "prompts", "each"), [(0.65, 150, 1), (0.9, 30, 1), (0.7, 60, 4)])
def test_the_accuracy_s_interval_covers(share, prompts, each):
    """It holds the true share in about 95 of 100 repetitions, with few prompts or clusters of alike pairs too."""
    rng = np.random.default_rng(2)
    names, inside, width = [str(i // each) for i in range(prompts * each)], 0, []
    for _ in range(400):
        right = np.repeat(rng.random(prompts) < share, each)  # all pairs of a prompt alike: the worst clusters
        found = clustered_share(right.astype(float), names)
        inside += found.low <= share <= found.high
        width.append(found.high - found.low)
    assert 368 <= inside <= 398
    assert np.mean(width) == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / prompts), rel=0.15)


def test_without_clusters_it_is_wilson_s_interval():
    right = np.array([1.0] * 22 + [0.0] * 8)
    found = clustered_share(right, [str(i) for i in range(30)])
    low, high = stats.binomtest(22, 30).proportion_ci(method="wilson")
    assert (found.mean, found.low, found.high) == pytest.approx((22 / 30, low, high), abs=5e-3)


def test_the_intervals_of_shares():
    low, high = wilson_interval(0.65, 150)
    expected = stats.binomtest(round(0.65 * 150), 150).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=4e-3)
    for count in range(1, 60):
        assert wilson_interval(1.0, count)[1] == 1.0 and wilson_interval(0.0, count)[0] == 0.0


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [([], [], "equally many and not none"), ([1.0], [1.0, 2.0], "equally many"), ([np.nan], [0.0], "must be finite")],
)
def test_what_cannot_be_measured_is_refused(chosen, rejected, message):
    with pytest.raises(InputError, match=message):
        pair_quality(chosen, rejected, [1.0] * len(chosen), [1.0] * len(rejected), ["p"] * len(chosen))
