"""Limits, attainment and regret: exact cases."""

from __future__ import annotations

import numpy as np
import pytest

from infalign import BestOfN, WorstOfN, win_rate_limit
from infalign.evaluation.limits import attainment, cluster_mean, level_masses, limit_at, regret_ratio, tie_limit


def test_cluster_mean_is_over_prompts():
    found = cluster_mean([np.array([1.0, 3.0]), np.array([4.0, 4.0])])
    assert (found.mean, found.error) == (3.0, pytest.approx(np.std([2.0, 4.0], ddof=1) / np.sqrt(2)))


def test_attainment_and_regret():
    assert attainment(0.9, 0.95, 1.0) == pytest.approx(0.4 / 0.45)
    assert np.isnan(attainment(0.5, 0.51, 0.001))
    assert regret_ratio(0.98, 0.99) == pytest.approx(2.0)
    assert np.isnan(regret_ratio(1.0, 1.0))


def test_level_masses():
    masses = level_masses(np.array([0.0, 0.0, 1.0, np.nan, 2.0]))
    assert masses.sum() == pytest.approx(1.0)
    assert masses[0] == 0.5 and (masses[1:] < 0.25).all()


@pytest.mark.parametrize("procedure", [BestOfN(4), WorstOfN(4), BestOfN(1)], ids=repr)
def test_without_ties_it_is_the_continuous_limit(procedure):
    rewards = np.random.default_rng(0).normal(size=(2, 64))
    found = tie_limit(procedure, list(rewards), 0.5)
    exact = float(win_rate_limit(procedure, 0.5))
    assert found <= exact + 1e-4
    assert found == pytest.approx(exact, abs=0.01)


def test_a_binary_reward_leaves_little():
    """infalign/theory/README.md, equation 7: p = .5, Best-of-4: no policy exceeds .531."""
    rewards = [np.array([0.0, 1.0] * 8)] * 3
    assert tie_limit(BestOfN(4), rewards, 10.0) == pytest.approx(0.53125, abs=1e-4)
    assert tie_limit(BestOfN(4), rewards, 0.0) == 0.5


def test_prompts_share_one_beta():
    """A prompt whose rewards are all tied can use no KL; the other may then spend twice the mean."""
    free, tied = np.random.default_rng(1).normal(size=64), np.zeros(64)
    both = tie_limit(BestOfN(2), [free, tied], 0.25)
    alone = tie_limit(BestOfN(2), [free], 0.5)
    assert both == pytest.approx((alone + 0.5) / 2, abs=2e-3)


@pytest.mark.parametrize("kl", [-0.01, 0.0, 7.8e-10, 1e-9, 0.5, 20.0, 60.0])
def test_any_measured_kl_has_a_limit(kl):
    """A policy that has hardly moved measures KLs of rounding; one that collapsed, KLs beyond every budget."""
    expected = 0.5 if kl < 1e-9 else float(win_rate_limit(BestOfN(4), min(kl, 20.0)))
    assert limit_at(BestOfN(4), kl) == expected


@pytest.mark.parametrize("kl", [0.0, 1e-13, 7e-10, 1.3e-8, 2e-7])
def test_a_policy_that_has_hardly_moved_has_a_limit(kl):
    """A measured KL may be of any size: W - 1/2 goes to 0 with sqrt(KL)."""
    rows = [np.arange(12.0) // 3, np.arange(12.0)]
    assert 0.5 <= tie_limit(BestOfN(4), rows, kl) <= 0.5 + 2.0 * np.sqrt(kl)
