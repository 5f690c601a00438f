"""Pooled ranks: by double loops, in the limits, and nearer to the exact quantile than K samples alone."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from infalign import BestOfN, CTRLReward, calibrate, optimal_transform
from infalign.calibration.pooling import LARGEST, pooled_ranks
from infalign.training.config import CTRLConfig
from infalign.training.direct import Direct
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.tiny import tiny_causal
from tests.training.test_trainer import config, references, token_sum

NAN = float("nan")


def by_hand(rewards, refs, log_ratios):
    """Mid-ranks by the definition: every scored sample in turn, its own weight by half."""
    weighted = [(value, 1.0) for value in refs if value == value]
    weighted += [
        (value, min(np.exp(-ratio), LARGEST))
        for value, ratio in zip(rewards, log_ratios, strict=True)
        if value == value
    ]
    total = sum(weight for _, weight in weighted)
    return [
        NAN if own != own else sum(w * (1.0 if v < own else 0.5 if v == own else 0.0) for v, w in weighted) / total
        for own in rewards
    ]


def test_ranks_by_the_definition():
    rng = np.random.default_rng(0)
    rewards, refs = rng.integers(0, 5, 7).astype(float), rng.integers(0, 5, 6).astype(float)
    rewards[2], refs[4], ratios = NAN, NAN, rng.normal(0, 1, 7)
    below, up_to, count = pooled_ranks(rewards, refs, ratios)
    np.testing.assert_allclose((below + up_to) / 2, by_hand(rewards, refs, ratios), equal_nan=True)
    assert 1.0 <= count <= 11.0


def test_shares_never_leave_the_unit_interval():
    rng = np.random.default_rng(4)
    for _ in range(500):
        below, up_to, _ = pooled_ranks(rng.normal(size=16), rng.normal(size=8), rng.normal(0, 2, 16))
        assert (below >= 0).all() and (up_to <= 1).all() and (below <= up_to).all()


def test_at_the_base_policy_the_mean_is_one_half_and_all_samples_count():
    """Log-ratios 0: the pool is K + G base samples, and the mean over all of them of their own rank is 1/2."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(4000):
        below, up_to, count = pooled_ranks(rng.normal(size=4), rng.normal(size=8), np.zeros(4))
        found.append(((below + up_to) / 2).mean())
    assert count == pytest.approx(12.0)
    assert np.mean(found) == pytest.approx(0.5, abs=0.006)


def test_a_policy_that_the_base_would_never_draw_from_counts_for_nothing():
    rng = np.random.default_rng(2)
    rewards, refs = rng.normal(size=5), rng.normal(size=9)
    below, up_to, count = pooled_ranks(rewards, refs, np.full(5, 60.0))
    np.testing.assert_allclose((below + up_to) / 2, calibrate([rewards], [refs])[0], atol=1e-12)
    assert count == pytest.approx(9.0)


@pytest.mark.parametrize("shift", [0.5, 1.0])
def test_it_is_nearer_to_the_exact_quantile(shift):
    """A policy shifted by so much in a normal reward, K = 8, G = 16: the variance of ranks at its samples halves."""
    rng, errors = np.random.default_rng(3), {"plain": [], "pooled": []}
    exact = np.vectorize(NormalDist().cdf)
    for _ in range(400):
        rewards, refs = rng.normal(shift, 1, 16), rng.normal(size=8)
        ratios = shift * rewards - shift**2 / 2  # log of N(shift, 1) over N(0, 1)
        below, up_to, _ = pooled_ranks(rewards, refs, ratios)
        errors["pooled"].append(((below + up_to) / 2 - exact(rewards)) ** 2)
        errors["plain"].append((calibrate([rewards], [refs])[0] - exact(rewards)) ** 2)
    assert np.mean(errors["pooled"]) < 0.55 * np.mean(errors["plain"])  # .42 and .46


def make(model, folder, transform, **changes):
    arguments = CTRLConfig(**config(folder / "out", **{"num_generations": 8, "max_steps": 3, "beta": 0.2, **changes}))
    reward = CTRLReward(token_sum, transform, method="pooled")
    return CTRLTrainer(model, reward, arguments, train_dataset=references())


@pytest.mark.parametrize(
    "transform", [optimal_transform(BestOfN(4), kl=1.0), Direct(BestOfN(4))], ids=["phi", "direct"]
)
def test_the_trainer_hands_on_the_ratios(transform, tmp_path):
    subject = make(tiny_causal(tmp_path / "model", "llama"), tmp_path, transform, learning_rate=1e-2)
    subject.train()
    counts = [row["calibration/effective_samples"] for row in subject.state.log_history if "reward/raw" in row]
    assert counts[0] == pytest.approx(len(references()[0]["ref_rewards"]) + 8)  # step 0: all weights are 1
    assert all(0 < count <= counts[0] + 1e-9 for count in counts)
    kl = [row["kl_seq"] for row in subject.state.log_history if "kl_seq" in row]
    assert subject.ctrl_reward.log_ratios_B.mean() == pytest.approx(kl[-1], abs=1e-5)


def test_without_log_probabilities_it_says_so():
    reward = CTRLReward(token_sum, optimal_transform(BestOfN(4), kl=1.0), method="pooled", num_generations=2)
    with pytest.raises(InputError, match="pooled calibration needs the rollouts' log-probabilities, which CTRLTrainer"):
        reward(["p", "p"], ["a", "b"], [[1], [2]], ref_rewards=[[1.0, 2.0]] * 2)
    with pytest.raises(InputError, match="has no reference reward"):
        pooled_ranks([1.0], [NAN], [0.0])
