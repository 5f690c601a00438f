"""Pooled ranks: by double loops, in the limits, and nearer to the exact quantile than K samples alone."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
import pytest

from infalign import BestOfN, CTRLReward, calibrate, optimal_transform
from infalign.calibration.pooling import LARGEST, Visits, pooled_ranks
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


class TestEarlierVisits:
    def test_they_rank_like_base_samples_of_their_weight(self):
        rng = np.random.default_rng(5)
        rewards, refs, old = rng.normal(size=6), rng.normal(size=8), rng.normal(size=(2, 6))
        ratios, visits = rng.normal(0, 1, (3, 6)), Visits()
        for one, ratio in zip(old, ratios, strict=False):
            visits.add("a", one, ratio)
        below, up_to, count = pooled_ranks(rewards, refs, ratios[2], earlier=visits.of("a"))
        # the definition: a pool of everything, the group's own samples last
        values = np.concatenate([refs, old.reshape(-1), rewards])
        weights = np.concatenate([np.ones(8), np.minimum(np.exp(-ratios), LARGEST).reshape(-1)])
        expected = [
            (weights[values < own].sum() + 0.5 * weights[values == own].sum()) / weights.sum() for own in rewards
        ]
        np.testing.assert_allclose((below + up_to) / 2, expected)
        assert count == pytest.approx(weights.sum() ** 2 / (weights**2).sum())

    def test_the_newest_are_kept_and_a_state_goes_on(self):
        visits = Visits(newest=3)
        visits.add("a", [1.0, 2.0], [0.0, 0.0])
        visits.add("b", [NAN], [0.0])
        visits.add("a", [3.0, NAN, 4.0], [0.0, 0.0, np.log(2.0)])
        again = Visits(newest=3)
        again.load(visits.state())
        for one in (visits, again):
            assert [column.tolist() for column in one.of("a")] == [[2.0, 3.0, 4.0], [1.0, 1.0, 0.5]]
            assert one.of("b")[0].size == 0 == one.of("c")[0].size
        empty = Visits()
        empty.load(Visits().state())
        assert empty.of("a")[0].size == 0

    def test_with_the_visits_errors_fall_further(self):
        """K = 4 and ten visits of a policy shifted by half a standard deviation: nearer than the group alone."""
        rng, errors = np.random.default_rng(6), {"group": [], "visits": []}
        exact = np.vectorize(NormalDist().cdf)
        for _ in range(100):
            refs, visits = rng.normal(size=4), Visits()
            for _ in range(10):
                rewards = rng.normal(0.5, 1, 8)
                ratios = 0.5 * rewards - 0.125
                for name, earlier in (("group", {}), ("visits", {"earlier": visits.of("a")})):
                    below, up_to, _ = pooled_ranks(rewards, refs, ratios, **earlier)
                    errors[name].append(((below + up_to) / 2 - exact(rewards)) ** 2)
                visits.add("a", rewards, ratios)
        assert np.mean(errors["visits"]) < 0.6 * np.mean(errors["group"])

    def test_a_prompt_that_is_visited_again_counts_more_samples(self, tmp_path):
        transform = optimal_transform(BestOfN(4), kl=1.0)
        model = tiny_causal(tmp_path / "model", "llama")
        arguments = CTRLConfig(**config(tmp_path / "out", num_generations=8, max_steps=3, beta=0.2))
        one = references().select([0])
        subject = CTRLTrainer(model, CTRLReward(token_sum, transform, method="pooled"), arguments, train_dataset=one)
        subject.train()
        counts = [row["calibration/effective_samples"] for row in subject.state.log_history if "reward/raw" in row]
        assert counts == pytest.approx([28, 36, 44], rel=0.05)  # 20 references and 8 rollouts a visit

    def test_rows_of_one_prompt_with_other_data_have_visits_of_their_own(self):
        def mirrored(prompts, completions, completion_ids, sign, **_):
            return [s * len(ids) for s, ids in zip(sign, completion_ids, strict=True)]

        reward = CTRLReward(mirrored, Direct(BestOfN(1)), method="pooled", num_generations=2)
        for sign in (1, -1):
            reward.log_ratios_B = np.zeros(2)
            data = [{"sign": sign}] * 2
            reward(["p"] * 2, ["a", "b"], [[1], [2, 3]], ref_rewards=[[0.0]] * 2, infalign_columns=data)
        assert sorted(reward.visits.state()["rewards"]) == [-2.0, -1.0, 1.0, 2.0]
        assert reward.visits.state()["counts"].tolist() == [2, 2]
