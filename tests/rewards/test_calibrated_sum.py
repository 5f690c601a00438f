"""A weighted sum of calibrated rewards named in a recipe: calibrated, trained on and evaluated."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from infalign.calibration.table import SampleTable
from infalign.rewards.calibrated_sum import sums_in
from infalign.stages.calibrate import calibrate, open_table
from infalign.stages.evaluate import evaluate
from infalign.stages.experiment import Experiment
from infalign.stages.recipe import load_recipe
from infalign.stages.train import train
from infalign.types import InputError
from tests.e2e.experiment import tiny_experiment

SOURCE = """
import math

def high(completion_ids, **_):
    return [float(sum(ids)) for ids in completion_ids]

def grown(completion_ids, **_):
    return [math.exp(sum(ids) / 50) - 3.0 for ids in completion_ids]

def first(completion_ids, **_):
    return [None if ids[0] % 7 == 0 else -float(ids[0]) for ids in completion_ids]
"""
WEIGHTS = (1.0, 0.25)


def recipe_of(folder, first="high", output="out", **changes):
    keys = tiny_experiment(folder)
    (folder / "members.py").write_text(SOURCE)
    names = (first, "first")
    members = [
        {"reward": f"{folder / 'members.py'}:{name}", "weight": w} for name, w in zip(names, WEIGHTS, strict=True)
    ]
    summed = {"reward": "infalign.rewards.combine:weighted_sum", "reward_kwargs": {"members": members}}
    return load_recipe(None, {**keys, **summed, "output_dir": str(folder / output), **changes})


def quantile(value, reference):
    known = [one for one in reference if not np.isnan(one)]
    return sum((one < value) + 0.5 * (one == value) for one in known) / len(known)


def by_hand(member_scores, references):
    """The sum for every sample of one prompt, by the definition."""
    rows = zip(*member_scores, strict=True)
    return [
        np.nan if any(map(np.isnan, row)) else sum(
            weight * quantile(value, reference)
            for weight, value, reference in zip(WEIGHTS, row, references, strict=True)
        )
        for row in rows
    ]  # fmt: skip


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A recipe that was calibrated."""
    recipe = recipe_of(tmp_path_factory.mktemp("sum"))
    calibrate(recipe)
    return recipe


def test_base_samples_of_all_prompts_have_the_members_scores_and_their_sum(done):
    experiment = Experiment(done)
    table = open_table(experiment)
    members = [table.rewards(member.fingerprint) for member in sums_in(experiment.reward)[0].members]
    found = table.rewards(experiment.reward.fingerprint)
    splits = experiment.splits
    assert set(found) == {prompt.key for prompt in (*splits.train, *splits.validation, *splits.test)}
    for key, scores in found.items():
        rows = [member[key] for member in members]
        assert len(scores) == done.num_calibration_samples
        np.testing.assert_allclose(scores, by_hand(rows, rows))
    assert any(np.isnan(scores).any() for scores in found.values())  # the member without a score had its effect


@pytest.mark.slow
def test_training_and_evaluation_take_it_and_measure_sums_against_the_base_samples(done):
    assert train(done)["steps"] == 2
    assert evaluate(done).reward == "weighted_sum"
    experiment = Experiment(done)
    calibrated = open_table(experiment)
    members = sums_in(experiment.reward)[0].members
    plan = next(done.output.glob("evaluation/**/plan.json"))
    table = SampleTable.open(plan.parent, json.loads(plan.read_text())["parts"])
    samples, found = table.samples(), table.rewards(experiment.reward.fingerprint)
    assert set(found) == {prompt.key for prompt in experiment.splits.test}
    for key, scores in found.items():
        ids = [list(sample.token_ids) for sample in samples[key]]
        rows = [member(["p"] * len(ids), ["x"] * len(ids), ids) for member in members]
        references = [calibrated.rewards(member.fingerprint)[key] for member in members]
        np.testing.assert_allclose(scores, by_hand(rows, references))


def test_an_increasing_map_of_a_member_changes_nothing(done, tmp_path):
    other = recipe_of(tmp_path, first="grown")
    calibrate(other)
    found = [open_table(Experiment(one)).rewards(Experiment(one).reward.fingerprint) for one in (done, other)]
    assert set(found[0]) == set(found[1])
    for key, scores in found[0].items():
        np.testing.assert_array_equal(scores, found[1][key])


def test_another_k_is_another_reward(done):
    other = dataclasses.replace(done, num_calibration_samples=done.num_calibration_samples + 1)
    assert Experiment(other).reward.fingerprint != Experiment(done).reward.fingerprint


def test_prompts_that_were_never_calibrated_can_not_be_scored(done):
    reward = Experiment(done).reward
    with pytest.raises(InputError, match="there are none of 'somewhere else': run `infalign calibrate`"):
        reward(["somewhere else"], ["x"], [[1]])


def test_a_gold_reward_is_none_of_them(tmp_path):
    recipe = recipe_of(tmp_path)
    recipe = dataclasses.replace(recipe, gold_reward=recipe.reward, gold_reward_kwargs=recipe.reward_kwargs)
    with pytest.raises(InputError, match="gold_reward: a weighted sum of calibrated rewards needs base samples"):
        _ = Experiment(recipe).gold
