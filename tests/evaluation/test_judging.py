"""Judged win rates: the draws follow the decoder's law, and the numbers are those of a count by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from infalign import BestOfN, KthOfN, TopOfN, WorstOfN, win_rate
from infalign.evaluation.judging import DecodedPair, draw_pairs, judged_wins
from infalign.types import InputError

NAN = np.nan


@pytest.mark.parametrize("procedure", [BestOfN(2), WorstOfN(2), KthOfN(2, 3), TopOfN(2, 3)], ids=repr)
def test_pairs_follow_the_decoder_s_law(procedure):
    """Frequencies of the drawn samples against the order weights, a sample without score never drawn."""
    rewards = np.array([0.3, -1.0, NAN, 2.0, 0.9])
    drawn = draw_pairs([rewards], [rewards], procedure, 4000, seed=0)
    scored = np.flatnonzero(~np.isnan(rewards))
    expected = dict(zip(scored[np.argsort(rewards[scored])].tolist(), procedure.order_weights(4), strict=True))
    for side in ("policy", "base"):
        picks = [getattr(pair, side) for pair in drawn]
        seen = [index for index, weight in expected.items() if weight > 1e-12]
        assert set(picks) <= set(seen)
        counts = [picks.count(index) for index in seen]
        assert stats.chisquare(counts, [4000 * expected[index] for index in seen]).pvalue > 1e-3


def test_a_judge_that_is_the_reward_gives_the_reward_s_win_rate():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(0.4, 1, (200, 6)), rng.normal(0, 1, (200, 6))
    pairs = draw_pairs(ours, theirs, BestOfN(2), 30, seed=3)
    margins = np.array([ours[p.prompt, p.policy] - theirs[p.prompt, p.base] for p in pairs])
    wins = (margins > 0).astype(float)
    found = judged_wins(pairs, wins, wins, margins)
    exact = win_rate(ours, theirs, BestOfN(2)).mean
    assert found.win_rate.mean == pytest.approx(exact, abs=4 * 0.5 / np.sqrt(6000))
    assert (found.disagreement, found.proxy_agreement, found.unjudged) == (0.0, 1.0, 0)


def test_numbers_by_hand():
    """Four pairs of two prompts: one disagreement, one without verdict in one order, one tie."""
    pairs = [DecodedPair(0, 0, 0), DecodedPair(0, 1, 0), DecodedPair(1, 0, 0), DecodedPair(1, 1, 1)]
    first, second = np.array([1.0, 1.0, NAN, 0.5]), np.array([1.0, 0.0, 1.0, 0.5])
    found = judged_wins(pairs, first, second, np.array([1.0, -1.0, 1.0, 1.0]))
    assert (found.pairs, found.unjudged) == (3, 1)
    assert found.win_rate.mean == pytest.approx(((1.0 + 0.5) / 2 + 0.5) / 2)  # prompts count alike
    assert found.disagreement == pytest.approx(1 / 3)
    assert found.first_preferred == pytest.approx(np.mean([(1 + 0) / 2, (1 + 1) / 2, 0.5]))
    assert found.proxy_agreement == 1.0  # of one pair: the others are ties of the judge


def test_a_judge_that_always_takes_the_first_says_nothing_of_the_policy():
    pairs = [DecodedPair(prompt, 0, 0) for prompt in range(10)]
    found = judged_wins(pairs, np.ones(10), np.zeros(10), np.ones(10))
    assert (found.win_rate.mean, found.disagreement, found.first_preferred) == (0.5, 1.0, 1.0)


def test_draws_depend_on_the_prompt_and_the_seed_alone():
    rewards = np.random.default_rng(0).normal(size=(5, 8))
    all_of_them = draw_pairs(rewards, rewards, BestOfN(2), 3, seed=1)
    assert draw_pairs(rewards[:2], rewards[:2], BestOfN(2), 3, seed=1) == all_of_them[:6]
    assert draw_pairs(rewards, rewards, BestOfN(2), 3, seed=2) != all_of_them


def test_no_verdict_at_all_is_an_error():
    with pytest.raises(InputError, match="no verdict on any of 1 pairs"):
        judged_wins([DecodedPair(0, 0, 0)], np.array([NAN]), np.array([1.0]), np.array([1.0]))
