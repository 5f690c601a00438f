"""The direct objective: its mean gradient is the exact gradient of the win rate, by enumeration of everything drawn."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from infalign import BestOfN, KthOfN, PessimisticOfN, RandomN, SoftBestOfN, TopOfN, WorstOfN, win_rate
from infalign.stages.objective import load_objective
from infalign.stages.recipe import load_recipe
from infalign.training.config import CTRLConfig
from infalign.training.direct import Direct, beats_decoded_base, direct_rewards
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.tiny import tiny_causal
from tests.training.test_trainer import config, references, token_sum

PROCEDURES = [BestOfN(1), BestOfN(2), WorstOfN(2), KthOfN(2, 2), RandomN((0.3, 0.7)), SoftBestOfN(2, 3.0)]
PROCEDURES += [TopOfN(2, 2), PessimisticOfN(2, 0.2)]
REWARDS = np.array([0.0, 1.0, 1.0, 2.0])  # four answers, two of which tie
BASE = np.array([0.4, 0.3, 0.2, 0.1])
LOGITS = np.array([0.3, -0.2, 0.5, 0.1])
K, G = 2, 3


def softmax(logits):
    chances = np.exp(logits - logits.max())
    return chances / chances.sum()


def exact_win_rate(logits, procedure):
    """P(decoded policy beats decoded base) + half of ties, from the masses of the reward's levels."""
    levels = np.unique(REWARDS)
    sides = [np.array([side[one == REWARDS].sum() for one in levels]) for side in (softmax(logits), BASE)]
    decoded = [np.diff(procedure.cdf(np.concatenate([[0.0], np.cumsum(side)]).clip(0, 1))) for side in sides]
    return sum(
        p * q * (1.0 if i > j else 0.5 if i == j else 0.0)
        for (i, p), (j, q) in itertools.product(enumerate(decoded[0]), enumerate(decoded[1]))
    )


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_the_mean_gradient_is_that_of_the_win_rate(procedure):
    """Over all 4^3 groups and 4^2 references: rewards, RLOO's baseline, mean over the group, times grad log pi."""
    policy, found = softmax(LOGITS), np.zeros(4)
    scores = np.eye(4) - policy  # grad of log pi(answer), one row an answer
    for refs in itertools.product(range(4), repeat=K):
        for group in itertools.product(range(4), repeat=G):
            chance = np.prod(BASE[list(refs)]) * np.prod(policy[list(group)])
            rewards = direct_rewards(
                beats_decoded_base(REWARDS[list(group)], REWARDS[list(refs)], procedure), procedure
            )
            advantages = (rewards - rewards.mean()) * G / (G - 1)  # minus the mean of the others
            found += chance * (advantages[:, None] * scores[list(group)]).mean(0)
    step = 1e-5
    exact = [
        (exact_win_rate(LOGITS + step * one, procedure) - exact_win_rate(LOGITS - step * one, procedure)) / (2 * step)
        for one in np.eye(4)
    ]
    np.testing.assert_allclose(found, exact, atol=1e-9)


@pytest.mark.parametrize("procedure", PROCEDURES, ids=repr)
def test_u_is_the_win_rate_of_the_estimator(procedure):
    """sum a_i f_(i) over the group is `win_rate` on the same samples; rewards sum to 0."""
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 6, 7).astype(float), rng.integers(0, 6, 9).astype(float)
    beats = beats_decoded_base(ours, theirs, procedure)
    assert procedure.order_weights(7) @ np.sort(beats) == pytest.approx(win_rate([ours], [theirs], procedure).mean)
    rewards = direct_rewards(beats, procedure)
    assert rewards.sum() == pytest.approx(0.0, abs=1e-12)
    by_hand = [
        6 * (procedure.order_weights(7) @ np.sort(beats) - procedure.order_weights(6) @ np.sort(np.delete(beats, one)))
        for one in range(7)
    ]
    np.testing.assert_allclose(rewards, by_hand, atol=1e-12)


def test_samples_without_a_score_are_as_if_they_were_not_there():
    rng = np.random.default_rng(1)
    ours, theirs = rng.normal(size=6), rng.normal(size=8)
    gaps = np.insert(ours, [2, 5], np.nan)
    found = direct_rewards(beats_decoded_base(gaps, np.append(theirs, np.nan), BestOfN(4)), BestOfN(4))
    wanted = direct_rewards(beats_decoded_base(ours, theirs, BestOfN(4)), BestOfN(4))
    assert np.isnan(found[np.isnan(gaps)]).all()
    np.testing.assert_allclose(found[~np.isnan(gaps)], wanted)


def test_increasing_maps_of_the_reward_change_nothing():
    rng = np.random.default_rng(2)
    ours, theirs = rng.normal(size=8), rng.normal(size=16)
    first = direct_rewards(beats_decoded_base(ours, theirs, BestOfN(4)), BestOfN(4))
    second = direct_rewards(beats_decoded_base(np.exp(3 * ours), np.exp(3 * theirs), BestOfN(4)), BestOfN(4))
    np.testing.assert_array_equal(first, second)


def test_too_few_of_anything_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"BestOfN\(4\) needs 4 base samples with a score for each prompt, one has 3"):
        beats_decoded_base([1.0], [1.0, 2.0, 3.0, np.nan], BestOfN(4))
    assert np.isnan(direct_rewards(np.arange(4.0), BestOfN(4))).all()  # no score for any of them, as for a missing one
    with pytest.raises(InputError, match="5 samples are not groups of num_generations=2"):
        score = CTRLReward(token_sum, Direct(BestOfN(1)), num_generations=2)
        score(["p"] * 5, ["c"] * 5, [[1, 2]] * 5, ref_rewards=[[1.0, 2.0]] * 5)
    with pytest.raises(InputError, match="needs num_generations above 4, got 4"):
        make(tiny_causal(tmp_path / "model", "llama"), tmp_path, num_generations=4)
    with pytest.raises(InputError, match="need to know how many samples a prompt has"):
        CTRLReward(token_sum, Direct(BestOfN(1)))(["p"], ["c"], [[1, 2]], ref_rewards=[[1.0, 2.0]])


def test_the_recipe_takes_it(tmp_path):
    keys = {"model_name_or_path": "m", "target_kl": 1.0, "num_calibration_samples": 8, "objective": "direct"}
    aim = load_objective(load_recipe(keys), BestOfN(4))
    assert aim.record()["transform"] == "direct" and aim.kl == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"num_calibration_samples of at least 9 for BestOfN\(9\), got 8"):
        load_objective(load_recipe(keys), BestOfN(9))
    with pytest.raises(InputError, match="objective: direct has no transform, got transform identity"):
        load_recipe({**keys, "transform": "identity"})


def make(model, folder, **changes):
    arguments = CTRLConfig(**config(folder / "out", **changes))
    reward = CTRLReward(token_sum, Direct(BestOfN(4), beta=0.1))
    return CTRLTrainer(model, reward, arguments, train_dataset=references())


def test_the_trainer_takes_it(tmp_path):
    subject = make(tiny_causal(tmp_path / "model", "llama"), tmp_path, num_generations=8, beta=None, max_steps=2)
    assert subject.args.beta == 0.1 and subject.procedure == BestOfN(4)
    subject.train()
    logged = [row["reward/transformed"] for row in subject.state.log_history if "reward/transformed" in row]
    assert len(logged) == 2 and logged == pytest.approx([0.0, 0.0], abs=1e-6)  # advantages sum to 0 in every group
