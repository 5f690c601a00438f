"""Length-controlled win rates: against scipy's own optimiser, and where the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import optimize, special

from infalign import BestOfN, KthOfN, WorstOfN, win_rate
from infalign.evaluation.length import Side, length_controlled_win_rate
from infalign.types import InputError


def side(rewards, lengths):
    return Side(list(rewards), list(rewards), list(lengths))


def by_optimiser(policy, base, weights):
    """All pairs, their weights, and the log-likelihood maximised by scipy: theta and phi."""
    rows = []
    for ours, theirs, our_lengths, their_lengths in zip(
        policy.judge, base.judge, policy.lengths, base.lengths, strict=True
    ):
        for i, y in enumerate(ours):
            for j, z in enumerate(theirs):
                win = 1.0 if y > z else 0.5 if y == z else 0.0
                rows.append((weights[i] * weights[j], our_lengths[i] - their_lengths[j], win))
    w, d, win = np.array(rows).T
    mean = (w * d).sum() / w.sum()
    x = np.tanh(d / np.sqrt((w * (d - mean) ** 2).sum() / w.sum()))

    def loss(c):
        m = c[0] + c[1] * x
        return -(w * (win * special.log_expit(m) + (1 - win) * special.log_expit(-m))).sum()

    return optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-9}).x


def test_it_is_the_maximum_likelihood_fit():
    rng = np.random.default_rng(0)
    lengths, base_lengths = rng.integers(5, 50, (30, 4)) + 8.0, rng.integers(5, 50, (30, 4)) * 1.0
    ours, theirs = rng.normal(0.3, 1, (30, 4)) + lengths / 40, rng.normal(0, 1, (30, 4)) + base_lengths / 40
    policy, base = side(ours, lengths), side(theirs, base_lengths)
    found = length_controlled_win_rate(policy, base, BestOfN(1))
    theta, phi = by_optimiser(policy, base, np.full(4, 0.25))
    assert found.mean == pytest.approx(special.expit(theta), abs=2e-3)  # pairs in a bin share their mean
    assert found.slope == pytest.approx(phi, abs=0.02)
    assert found.plain == pytest.approx(win_rate(ours, theirs, BestOfN(1)).mean)
    assert found.longer == pytest.approx(lengths.mean() - base_lengths.mean())


def test_the_decoder_weighs_the_pairs():
    """Best-of-4 of four samples decodes the best: its control is that of the best samples alone."""
    rng = np.random.default_rng(1)
    lengths, base_lengths = rng.integers(5, 50, (40, 4)) * 1.0, rng.integers(5, 50, (40, 4)) * 1.0
    ours, theirs = rng.normal(0.3, 1, (40, 4)), rng.normal(0, 1, (40, 4))
    best, base_best = ours.argmax(1), theirs.argmax(1)
    rows = np.arange(40)
    alone = length_controlled_win_rate(
        side(ours[rows, best][:, None], lengths[rows, best][:, None]),
        side(theirs[rows, base_best][:, None], base_lengths[rows, base_best][:, None]),
        BestOfN(1),
    )
    found = length_controlled_win_rate(side(ours, lengths), side(theirs, base_lengths), BestOfN(4))
    assert found == alone
    for procedure in (BestOfN(2), KthOfN(2, 3), WorstOfN(3)):
        some = length_controlled_win_rate(side(ours, lengths), side(theirs, base_lengths), procedure)
        assert some.plain == pytest.approx(win_rate(ours, theirs, procedure).mean)
    worst = length_controlled_win_rate(side(ours, lengths), side(theirs, base_lengths), WorstOfN(4))
    assert worst.plain == pytest.approx(win_rate(ours, theirs, WorstOfN(4)).mean)


def test_a_reward_that_is_length_wins_by_length_alone():
    """The policy answers longer and the reward counts: controlled for length, half."""
    rng = np.random.default_rng(2)
    lengths, base_lengths = rng.normal(60, 15, (300, 6)), rng.normal(50, 15, (300, 6))
    noisy, base_noisy = lengths + rng.normal(0, 20, lengths.shape), base_lengths + rng.normal(0, 20, lengths.shape)
    found = length_controlled_win_rate(side(noisy, lengths), side(base_noisy, base_lengths), BestOfN(1))
    assert found.plain > 0.57 and found.mean == pytest.approx(0.5, abs=0.015)
    assert found.low <= 0.5 <= found.high


def test_a_reward_that_ignores_length_is_left_alone():
    rng = np.random.default_rng(3)
    lengths, base_lengths = rng.normal(60, 15, (300, 6)), rng.normal(50, 15, (300, 6))
    ours, theirs = rng.normal(0.5, 1, lengths.shape), rng.normal(0, 1, lengths.shape)
    found = length_controlled_win_rate(side(ours, lengths), side(theirs, base_lengths), BestOfN(1))
    assert found.mean == pytest.approx(found.plain, abs=0.02) and found.low < found.mean < found.high


def test_equal_lengths_leave_nothing_to_control():
    rng = np.random.default_rng(4)
    ours, theirs, lengths = rng.normal(0.5, 1, (50, 4)), rng.normal(0, 1, (50, 4)), np.full((50, 4), 7.0)
    found = length_controlled_win_rate(side(ours, lengths), side(theirs, lengths), BestOfN(2))
    assert found.mean == pytest.approx(found.plain, abs=1e-5) and found.slope == 0.0


def test_samples_without_a_score_are_left_out_and_prompts_must_match():
    lengths = np.ones((3, 3))
    ours = np.array([[1.0, np.nan, 2.0]] * 3)
    found = length_controlled_win_rate(side(ours, lengths), side(np.ones((3, 3)), lengths), BestOfN(1))
    assert found.plain == pytest.approx(0.75)
    with pytest.raises(InputError, match="the same prompts, got 3 and 2"):
        length_controlled_win_rate(side(ours, lengths), side(np.ones((2, 3)), np.ones((2, 3))), BestOfN(1))


def test_one_prompt_has_no_interval():
    found = length_controlled_win_rate(side([[1.0, 0.0]], [[2.0, 1.0]]), side([[0.5]], [[1.5]]), BestOfN(1))
    assert np.isnan([found.low, found.high]).all() and found.plain == 0.5 and not np.isnan(found.mean)


@pytest.mark.parametrize(("apart", "told"), [(0, True), (15, True), (60, False)])
def test_lengths_that_do_not_overlap_leave_nothing_to_say(apart, told):
    """Every answer of the policy longer: what would happen at equal length is not in the data."""
    rng = np.random.default_rng(5)
    lengths, base_lengths = rng.uniform(20, 50, (40, 4)) + apart, rng.uniform(20, 50, (40, 4))
    ours, theirs = rng.normal(0.3, 1, (40, 4)), rng.normal(0, 1, (40, 4))
    found = length_controlled_win_rate(side(ours, lengths), side(theirs, base_lengths), BestOfN(2))
    assert np.isfinite([found.mean, found.low, found.high]).all() == told
    assert np.isnan([found.mean, found.low, found.high]).all() != told
    assert found.plain == pytest.approx(win_rate(ours, theirs, BestOfN(2)).mean)
