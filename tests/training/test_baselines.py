"""Rival objectives: each value by its paper's formula in plain loops, and the same trainer around all of them."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import integrate, stats

from infalign import BestOfN, KthOfN, RandomN, WorstOfN, optimal_transform, tilt, transforms
from infalign.stages.objective import load_objective, load_procedure, objective_name
from infalign.stages.recipe import load_recipe
from infalign.training.baselines import BASELINES, Baseline, base_spread, start
from infalign.training.card import model_card
from infalign.training.config import CTRLConfig
from infalign.training.reward import CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.tiny import tiny_causal
from tests.training.test_trainer import config, references, token_sum

RECIPE = {"model_name_or_path": "m", "num_calibration_samples": 8}
RNG = np.random.default_rng(0)
REWARDS, REFS = RNG.normal(2.0, 3.0, 7), RNG.normal(0.0, 3.0, 9)


def softmax(logits):
    chances = np.exp(logits - logits.max())
    return chances / chances.sum()


def test_raw_is_the_reward_itself():
    np.testing.assert_array_equal(Baseline("raw", BestOfN(4)).values(REWARDS, REFS), REWARDS)
    np.testing.assert_allclose(Baseline("raw", BestOfN(4), scale=3.0).values(REWARDS, REFS), REWARDS / 3.0)


@pytest.mark.parametrize(("procedure", "pick"), [(BestOfN(3), max), (WorstOfN(2), min)], ids=repr)
def test_pkpo_is_max_at_k_without_the_sample(procedure, pick):
    """max@k over all subsets of the others, taken from that over all subsets; the paper's leave-one-out baseline."""

    def at_k(values):
        return np.mean([pick(subset) for subset in itertools.combinations(values, procedure.n)])

    wanted = [6 * (at_k(REWARDS) - at_k(np.delete(REWARDS, one))) for one in range(7)]
    np.testing.assert_allclose(Baseline("pkpo", procedure).values(REWARDS, REFS), wanted, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_pkpo_has_the_papers_weights(k):
    """s_i of the paper less its mean over the groups without i... is the same advantage, by theory.md, section 8."""
    ascending, m = np.sort(REWARDS), REWARDS.size
    choose = math.comb
    s = np.array(
        [
            (choose(i, k - 1) * ascending[i] + sum(choose(j - 1, k - 2) * ascending[j] for j in range(i + 1, m)))
            / choose(m, k)
            for i in range(m)
        ]
    )
    found = np.sort(Baseline("pkpo", BestOfN(k)).values(ascending, REFS))
    # sum of s_i is k max@k; what a sample takes part in, less what the subsets without it would have had
    max_at_k = s.sum() / k
    without = [choose(m, k) * (max_at_k - one) / choose(m - 1, k) for one in s]
    np.testing.assert_allclose(found, (m - 1) * (max_at_k - np.array(without)), atol=1e-12)


@pytest.mark.parametrize("name", ["pkpo", "iama"])
def test_the_mean_gradient_is_that_of_the_decoded_reward(name):
    """Over all groups of five out of three answers: the expected best of two, exact for PKPO; near it for IAMA."""
    rewards, logits, group = np.array([0.0, 1.0, 3.0]), np.array([0.3, -0.2, 0.1]), 5
    policy, found = softmax(logits), np.zeros(3)
    baseline = Baseline(name, BestOfN(2))
    for answers in itertools.product(range(3), repeat=group):
        values = baseline.values(rewards[list(answers)], REFS)
        advantages = (values - values.mean()) * group / (group - 1)
        scores = np.eye(3)[list(answers)] - policy
        found += np.prod(policy[list(answers)]) * (advantages[:, None] * scores).mean(0)

    def best_of_two(moved):
        chances = softmax(moved)
        return sum(chances[i] * chances[j] * max(rewards[i], rewards[j]) for i in range(3) for j in range(3))

    step = 1e-5
    exact = [(best_of_two(logits + step * one) - best_of_two(logits - step * one)) / (2 * step) for one in np.eye(3)]
    if name == "pkpo":
        np.testing.assert_allclose(found, exact, atol=1e-9)
    else:  # the group's own distribution function stands for the policy's
        assert found @ exact / np.linalg.norm(found) / np.linalg.norm(exact) > 0.98


@pytest.mark.parametrize("procedure", [BestOfN(4), WorstOfN(3), KthOfN(2, 3)], ids=repr)
def test_iama_is_the_first_variation(procedure):
    """With very many rollouts: int g(F(s)) ds up to the sample, F the policy's distribution function."""
    rewards = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    values = Baseline("iama", procedure).values(rewards, REFS)
    for low, high in [(-1.0, 0.5), (0.0, 1.5)]:
        wanted = integrate.quad(lambda s: float(procedure.density(stats.norm.cdf(s))), low, high)[0]
        first, last = np.searchsorted(rewards, [low, high])
        assert values[last] - values[first] == pytest.approx(wanted, abs=2e-3)


def test_par_is_the_mean_sigmoid_of_centred_rewards():
    wanted = [np.mean([1 / (1 + math.exp(-(reward - ref))) for ref in REFS]) for reward in REWARDS]
    found = Baseline("par", BestOfN(4)).values(REWARDS, [*REFS, math.nan])
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_grpo_is_the_groups_standard_score():
    found = Baseline("grpo", BestOfN(4)).values(REWARDS, REFS)
    np.testing.assert_allclose(found, (REWARDS - REWARDS.mean()) / (np.std(REWARDS, ddof=1) + 1e-4), atol=1e-12)
    assert np.isfinite(Baseline("grpo", BestOfN(4)).values(np.ones(4), REFS)).all()


@pytest.mark.parametrize("name", BASELINES)
def test_no_score_no_value_and_order_does_not_matter(name):
    baseline = Baseline(name, BestOfN(3), scale=2.0)
    rewards = np.array([1.0, math.nan, -2.0, 0.5, 3.0, 0.0])
    found = baseline.values(rewards, REFS)
    assert np.isnan(found).tolist() == np.isnan(rewards).tolist()
    np.testing.assert_allclose(found[[0, 2, 3, 4, 5]], baseline.values(rewards[[0, 2, 3, 4, 5]], REFS))
    order = [4, 2, 0, 5, 3, 1]
    np.testing.assert_allclose(baseline.values(rewards[order], REFS), found[order])
    assert np.isnan(Baseline(name, BestOfN(3)).values([math.nan] * 5, REFS)).all()
    if name == "pkpo":
        assert np.isnan(baseline.values([1.0, 2.0, 3.0], REFS)).all()


@pytest.mark.parametrize("name", ["raw", "pkpo", "iama", "grpo"])
def test_the_unit_of_the_reward_does_not_matter(name):
    """In units of the base's spread within prompts; PAR's sigmoid knows its scale."""
    base = [RNG.normal(size=20), 5.0 + RNG.normal(size=20)]
    plain, tenfold = (
        Baseline(name, BestOfN(2), scale=base_spread([unit * row for row in base])).values(unit * REWARDS, unit * REFS)
        for unit in (1.0, 10.0)
    )
    np.testing.assert_allclose(plain, tenfold, atol=1e-3)  # GRPO adds 1e-4 to the standard deviation


def test_the_spread_is_that_within_prompts():
    rows = [np.array([1.0, 3.0, math.nan]), np.array([10.0, 14.0]), np.array([7.0])]
    assert base_spread(rows) == pytest.approx(math.sqrt((2.0 + 8.0) / 2))
    assert base_spread([np.ones(4)]) == base_spread([]) == 1.0


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


@pytest.mark.parametrize("name", BASELINES)
def test_the_trainer_maximises_it(name, llama, tmp_path):
    """A batch's advantages by hand: the value, less beta times the log-ratio, less the mean of the others'."""
    procedure = BestOfN(2)
    reward = CTRLReward(token_sum, Baseline(name, procedure, scale=40.0, beta=0.05))
    subject = CTRLTrainer(
        llama, reward, CTRLConfig(**config(tmp_path / "out", max_steps=1, beta=None)), train_dataset=references()
    )
    assert subject.args.beta == 0.05
    drawn = []
    original = subject._generate_and_score_completions

    def watched(inputs):
        batch = original(inputs)
        drawn.append((inputs, batch))
        return batch

    subject._generate_and_score_completions = watched
    subject.train()
    inputs, batch = drawn[0]
    group = subject.num_generations
    real = batch["completion_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(batch["completion_ids"], real, strict=True)]
    raw = np.array(token_sum(completion_ids=ids)).reshape(-1, group)
    # before the first step the log-ratios are 0
    wanted = []
    for rewards_G, row in zip(raw, inputs[::group], strict=True):
        values = reward.transform.values(rewards_G, row["ref_rewards"])
        wanted.append((values - values.mean()) * group / (group - 1))
    np.testing.assert_allclose(batch["advantages"].numpy(), np.concatenate(wanted), atol=1e-4)
    assert f"the baseline {reward.transform.label}, on the raw reward" in model_card(subject, "policy")


@pytest.mark.parametrize("name", BASELINES)
def test_a_recipe_takes_one_word(name):
    recipe = load_recipe({**RECIPE, "objective": name, "target_kl": 1.0})
    found = load_objective(recipe, load_procedure(recipe))
    assert found.policy is None and found.beta > 0 and found.label.startswith(name)
    assert objective_name(recipe) == f"objective {name} (a baseline)"
    given = load_objective(load_recipe({**RECIPE, "objective": name, "beta": 0.3}), BestOfN(4))
    assert given.beta == 0.3


def test_the_first_beta_of_raw_is_that_of_gaussian_rewards():
    recipe = load_recipe({**RECIPE, "objective": "raw", "target_kl": 0.5})
    assert load_objective(recipe, BestOfN(4)).beta == pytest.approx(1.0, rel=0.01)  # KL of exp(z/beta) is 1/(2 beta^2)


def test_the_start_at_the_base_is_the_first_variation_there():
    phi, z = start("iama", BestOfN(3)), stats.norm.ppf
    wanted = integrate.quad(lambda u: 3 * u**2 / stats.norm.pdf(z(u)), 0.2, 0.8)[0]
    assert float(phi(0.8) - phi(0.2)) == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("kl", [0.25, 1.0])
@pytest.mark.parametrize("procedure", [BestOfN(4), WorstOfN(4)], ids=repr)
def test_the_start_is_the_optimum_for_gaussian_rewards(procedure, kl):
    """No policy of that KL has a higher decoded mean reward: not those of the catalogue, nor the win rate's optimum."""
    u_Q = np.linspace(0, 1, 4001)[1:-1]

    def decoded_mean(transform):
        chosen = procedure.cdf(np.clip(tilt(transform, kl=kl).cdf(u_Q), 0, 1))
        return -np.trapezoid(chosen, stats.norm.ppf(u_Q))  # int z dG(Q), by parts, up to a constant

    best = decoded_mean(start("pkpo", procedure, kl))
    sharper = transforms.exponential(10.0 if procedure == BestOfN(4) else -10.0)
    rivals = [transforms.identity, transforms.normal_icdf, sharper, optimal_transform(procedure, kl=kl)]
    assert all(best > decoded_mean(one) - 1e-3 for one in rivals)
    assert best > decoded_mean(transforms.identity) + 0.01


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"objective": "raw", "transform": "identity"}, "objective: raw has no transform"),
        ({"objective": "par", "calibration_method": "pooled"}, "objective: par is on the raw reward"),
        ({"objective": "max_at_k"}, "objective"),
    ],
)
def test_mistakes_in_a_recipe(keys, words):
    with pytest.raises(InputError, match=words):
        load_recipe({**RECIPE, "target_kl": 1.0, **keys})


def test_mistakes_in_python():
    with pytest.raises(InputError, match="unknown baseline 'dpo'"):
        Baseline("dpo", BestOfN(4))
    with pytest.raises(InputError, match="scale must be a positive number"):
        Baseline("raw", BestOfN(4), scale=0.0)
    with pytest.raises(InputError, match="ranks rewards, and raw is on the raw reward"):
        CTRLReward(token_sum, Baseline("raw", BestOfN(4)), method="pooled")
    reward = CTRLReward(token_sum, Baseline("pkpo", RandomN((0.5, 0.5))))
    with pytest.raises(InputError, match="needs num_generations above 2, got 2"):
        reward.join(2, [reward])
