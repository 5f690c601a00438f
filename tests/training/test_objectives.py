"""Several objectives: the gradient is that of the weighted sum, each reward is asked once, mistakes are one line."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset

from infalign import BestOfN, WorstOfN
from infalign.stages.objective import load_objective, load_procedure, trained_procedures
from infalign.stages.recipe import load_recipe
from infalign.theory.optimum import optimal_transform
from infalign.theory.transforms import identity
from infalign.training.config import CTRLConfig
from infalign.training.direct import Direct, beats_decoded_base, direct_rewards
from infalign.training.reward import TERMS, CTRLReward
from infalign.training.trainer import CTRLTrainer
from infalign.types import InputError
from tests.tiny import tiny_causal
from tests.training.test_trainer import PROMPTS, config, token_sum

RECIPE = {"model_name_or_path": "m", "target_kl": 1.0, "num_calibration_samples": 8}


def largest(completion_ids, **_):
    return [float(max(ids)) + 0.001 * ids[0] for ids in completion_ids]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_causal(tmp_path_factory.mktemp("llama"), "llama")


def rows():
    rng = np.random.default_rng(0)
    sums, largest_ones = ([rng.normal(*law, 20).tolist() for _ in PROMPTS] for law in ((220, 40), (75, 15)))
    return Dataset.from_dict({"prompt": PROMPTS, "ref_rewards": sums, "ref_largest": largest_ones})


def terms(method="midrank", first=token_sum):
    """Three objectives of two rewards."""
    of_largest = {"column": "ref_largest", "method": method}
    return [
        CTRLReward(first, Direct(BestOfN(2), beta=0.1), name="best", method=method),
        CTRLReward(largest, Direct(WorstOfN(3), beta=0.2), name="worst largest", **of_largest),
        CTRLReward(first, Direct(WorstOfN(2), beta=0.4), name="worst", method=method),
    ]


WEIGHTS = [1.0, 0.5, 2.0]


def make(model, folder, rewards=None, weights=WEIGHTS, dataset=None, **changes):
    arguments = CTRLConfig(**config(folder / "out", reward_weights=weights, **changes))
    return CTRLTrainer(model, rewards or terms(), arguments, train_dataset=dataset or rows())


def last_batch(subject):
    """Train, and return the advantages of the last batch, its rows, and its completions' tokens."""
    seen = {}
    generate = subject._generate_and_score_completions

    def watch(inputs):
        seen["batch"], seen["inputs"] = generate(inputs), inputs
        return seen["batch"]

    subject._generate_and_score_completions = watch
    subject.train()
    batch = seen["batch"]
    real = batch["completion_mask"].bool()
    ids = [row[mask].tolist() for row, mask in zip(batch["completion_ids"], real, strict=True)]
    return batch["advantages"].cpu().numpy(), seen["inputs"], ids


def test_advantages_are_the_weighted_sum_of_the_terms_own(llama, tmp_path):
    """By hand, from the rollouts of a batch and their log-ratios."""
    advantages, inputs, ids = last_batch(make(llama, tmp_path, beta=0.05, max_steps=1))
    total = np.zeros(len(ids))
    for weight, score, column, procedure in (
        (1.0, token_sum, "ref_rewards", BestOfN(2)),
        (0.5, largest, "ref_largest", WorstOfN(3)),
        (2.0, token_sum, "ref_rewards", WorstOfN(2)),
    ):
        raw = np.array(score(completion_ids=ids))
        for start in range(0, len(ids), 4):
            group = slice(start, start + 4)
            found = direct_rewards(beats_decoded_base(raw[group], inputs[start][column], procedure), procedure)
            total[group] += weight * found * 4 / 3  # the others' mean is -1/3 of one's own, as they sum to 0
    np.testing.assert_allclose(advantages, total, atol=1e-5)  # KL is 0 at the first step
    assert np.abs(total).max() > 0.1


def test_beta_is_the_weighted_sum_of_the_terms_own(llama, tmp_path):
    assert make(llama, tmp_path, beta=None).args.beta == pytest.approx(0.1 + 0.5 * 0.2 + 2 * 0.4)


def test_each_is_logged_and_measured_under_its_name(llama, tmp_path):
    subject = make(llama, tmp_path, max_steps=1)
    subject.train()
    names = {name for row in subject.state.log_history for name in row}
    assert {f"winrate/{one}" for one in ("best", "worst", "worst largest")} <= names
    assert {"reward/calibrated/best", "reward/calibrated/worst largest"} <= names and "winrate" not in names
    found = subject.evaluate(rows())
    assert found["eval_winrate"] == found["eval_winrate/best"]
    assert 0 < found["eval_winrate/worst largest"] < 1 and found["eval_winrate/worst"] != found["eval_winrate/best"]


def test_terms_that_share_a_reward_ask_it_once(llama, tmp_path):
    asked = []

    def counted(completion_ids, **columns):
        asked.append(sorted(name for name in columns if "ref" in name))
        return token_sum(completion_ids)

    subject = make(llama, tmp_path, terms(first=counted), max_steps=3)
    subject.train()
    assert asked == [[], [], []]  # once a step; reference rewards, its own and the others', are not for it to see


def test_mistakes_in_python_are_one_line(llama, tmp_path):
    same_name = [CTRLReward(token_sum, Direct(BestOfN(2), beta=0.1)) for _ in range(2)]
    with pytest.raises(InputError, match=r"2 CTRLRewards, several of them named 'ctrl': give each CTRLReward\(name="):
        make(llama, tmp_path, same_name, weights=None)
    one_column = [*terms()[:1], CTRLReward(largest, Direct(BestOfN(2), beta=0.1), name="other")]
    with pytest.raises(InputError, match="two rewards and read their reference rewards from one column, 'ref_rewards'"):
        make(llama, tmp_path, one_column, weights=None)
    with pytest.raises(InputError, match="has no column 'ref_largest' with the reference rewards"):
        make(llama, tmp_path, dataset=rows().remove_columns("ref_largest"))
    with pytest.raises(InputError, match=r"direct BestOfN\(2\) needs num_generations above 2, got 2"):
        make(llama, tmp_path, num_generations=2)
    transformed = [*terms()[:2], CTRLReward(token_sum, identity, name="transformed")]
    with pytest.raises(InputError, match=r"reward_weights=\[1.0, 0.5, 2.0\]: the weight would multiply the transform"):
        make(llama, tmp_path, transformed)


def recipe(*objectives, **keys):
    return load_recipe({**RECIPE, **keys, "objectives": list(objectives)})


HELPFUL, SAFE = {"reward": "a.py:build"}, {"procedure": "worst_of_n", "reward": "b.py:build", "weight": 0.5}


def test_a_recipe_completes_its_terms_and_the_first_is_its_own():
    found = recipe(HELPFUL, SAFE, n=2)
    assert (found.reward, found.procedure, found.n, found.objective) == ("a.py:build", "best_of_n", 2, "direct")
    assert found.objectives[1] == {**SAFE, "n": 2, "procedure_kwargs": {}, "reward_kwargs": {}}
    assert recipe({"reward": "a.py:build", "procedure": "random_n", "procedure_kwargs": {"pmf": [0.5, 0.5]}}).n == 4
    aim = load_objective(found, load_procedure(found))
    betas = [optimal_transform(kind(2), kl=1.0).beta for kind in (BestOfN, WorstOfN)]
    assert aim.beta == pytest.approx(betas[0] + 0.5 * betas[1]) and aim.kl is None
    assert aim.label == "direct: 1 BestOfN(2) of a.py:build + 0.5 WorstOfN(2) of b.py:build"


@pytest.mark.parametrize(
    ("objectives", "keys", "message"),
    [
        ([{**HELPFUL, "wieght": 2}], {}, "objectives, entry 1: unknown key wieght: did you mean 'weight'"),
        ([HELPFUL, {**SAFE, "weight": 0}], {}, "entry 2: weight must be a number above 0, got 0: .* turn the reward's"),
        ([HELPFUL, {**SAFE, "weight": "much"}], {}, "entry 2: weight: expected a number, got 'much'"),
        ([HELPFUL, {**HELPFUL, "weight": 2}], {}, "entries 1 and 2: the same twice: keep one, with both weights"),
        ([{"procedure": "best_of_n"}], {}, "entry 1: it has no reward, and the recipe has none: add reward"),
        ([{**HELPFUL, "n": 0}], {}, "entry 1: n must be at least 1, got 0"),
        ([{**HELPFUL, "procedure": "random_n", "n": 3}], {}, "entry 1: procedure random_n takes no n, got 3"),
        ([{**HELPFUL, "procedure": "p.py:mine", "n": 3}], {}, "entry 1: n is for the built-in procedures"),
        ([{**HELPFUL, "weight": 2}], {}, "one entry: its weight 2 would only scale beta: leave it out"),
        ([HELPFUL, SAFE], {"objective": "transform"}, "objectives are trained by objective: direct, got transform"),
        ([HELPFUL, SAFE], {"transform": "identity"}, "objective: direct has no transform, got transform identity"),
        ([HELPFUL, SAFE], {"reward": "c.py:build"}, "reward is 'c.py:build', and 'a.py:build' in the first of obj"),
        ([SAFE, HELPFUL], {"procedure": "best_of_n"}, "procedure is 'best_of_n', and 'worst_of_n' in the first of"),
        (["a.py:build"], {}, "objectives: expected a mapping, got 'a.py:build'"),
    ],
)
def test_mistakes_in_a_recipe_are_one_line(objectives, keys, message):
    with pytest.raises(InputError, match=message):
        recipe(*objectives, **keys)


def test_every_term_needs_its_samples():
    found = recipe(HELPFUL, {**SAFE, "n": 9})
    with pytest.raises(InputError, match=r"num_calibration_samples of at least 9 for WorstOfN\(9\), got 8"):
        load_objective(found, load_procedure(found))


TWO = [{"reward": "a.py:f"}, {"reward": "b.py:f", "procedure": "worst_of_n", "n": 2, "weight": 0.5}]


def test_weights_in_place_of_the_terms_own():
    recipe = load_recipe({**RECIPE, "objectives": TWO, "objective_weights": [0.25, 0.75]})
    assert [one["weight"] for one in recipe.objectives] == [0.25, 0.75]
    both = load_objective(recipe, load_procedure(recipe))
    betas = [optimal_transform(one, kl=1.0).beta for one in (BestOfN(4), WorstOfN(2))]
    assert both.beta == pytest.approx(0.25 * betas[0] + 0.75 * betas[1])


def test_a_term_of_weight_zero_is_measured_and_not_trained_for():
    """An expert's beta and label are those of its own term, whichever it is."""
    for weights, procedure, beta_of in (([1, 0], BestOfN(4), "a.py:f"), ([0, 2], WorstOfN(2), "b.py:f")):
        recipe = load_recipe({**RECIPE, "objectives": TWO, "objective_weights": weights})
        aim = load_objective(recipe, load_procedure(recipe))
        assert aim.procedure == procedure and aim.label == f"direct of {beta_of}"
        assert aim.beta == pytest.approx(optimal_transform(procedure, kl=1.0).beta)
        assert trained_procedures(recipe) == [procedure]
        assert load_procedure(recipe) == BestOfN(4)  # what decodes stays the first term's


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objectives": TWO, "objective_weights": [1.0]}, "must be 2 numbers, one for each of objectives"),
        ({"objectives": TWO, "objective_weights": [0, 0]}, "at least 0, and one of them above"),
        ({"objectives": TWO, "objective_weights": [1, -1]}, "at least 0, and one of them above"),
        ({"objectives": TWO[:1], "objective_weights": [1]}, "are for several objectives, got 1"),
        ({"reward": "a.py:f", "objective_weights": [1]}, "are for several objectives, got 0"),
    ],
)
def test_wrong_weights_are_one_line(keys, message):
    with pytest.raises(InputError, match=message):
        load_recipe({**RECIPE, **keys})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"objectives": TWO, "objective_mix": [1.0]}, "objective_mix must be 2 numbers, one for each of objectives"),
        ({"objectives": TWO, "objective_mix": [0, 0]}, "objective_mix must be at least 0, and one of them above"),
        ({"objectives": TWO[:1], "objective_mix": [1]}, "objective_mix are for several objectives, got 1"),
        ({"objectives": TWO, "objective_mix": [1, 1], "objective_weights": [1, 1]}, "leave one of them out"),
    ],
)
def test_wrong_chances_are_one_line(keys, message):
    with pytest.raises(InputError, match=message):
        load_recipe({**RECIPE, **keys})


def test_chances_sum_to_one_and_are_told_from_weights():
    mixed, joint = (
        load_objective(recipe, load_procedure(recipe))
        for recipe in (
            load_recipe({**RECIPE, "objectives": TWO, "objective_mix": [3, 1]}),
            load_recipe({**RECIPE, "objectives": TWO, "objective_weights": [0.75, 0.25]}),
        )
    )
    assert mixed.beta == pytest.approx(joint.beta)
    assert mixed.label == joint.label.replace("direct: ", "direct, each prompt for one of: ") != joint.label


def test_a_prompt_of_another_term_is_worth_nothing_here(llama, tmp_path):
    """By hand: each group has the advantages of its own term alone, and raw rewards do not see the column."""
    asked = []

    def counted(completion_ids, **columns):
        asked.append(TERMS in columns)
        return token_sum(completion_ids)

    column = [[number % 3] for number in range(len(PROMPTS))]
    rewards = [
        CTRLReward(one.raw, one.transform, name=one.name, column=one.column, only=number)
        for number, one in enumerate(terms(first=counted))
    ]
    dataset = rows().add_column(TERMS, column)
    advantages, inputs, ids = last_batch(make(llama, tmp_path, rewards, [1.0] * 3, dataset, beta=0.05, max_steps=1))
    own = [(token_sum, "ref_rewards", BestOfN(2)), (largest, "ref_largest", WorstOfN(3)),
           (token_sum, "ref_rewards", WorstOfN(2))]  # fmt: skip
    met = set()
    for start in range(0, len(ids), 4):
        group, (term,) = slice(start, start + 4), inputs[start][TERMS]
        score, of, procedure = own[term]
        raw = np.array(score(completion_ids=ids[group]))
        wanted = direct_rewards(beats_decoded_base(raw, inputs[start][of], procedure), procedure) * 4 / 3
        np.testing.assert_allclose(advantages[group], wanted, atol=1e-5)
        met.add(term)
    assert len(met) > 1 and asked and not any(asked)
